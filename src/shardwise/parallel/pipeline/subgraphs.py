"""Split a worker's graph into consecutive parts, and compile them to Python functions."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from shardwise.parallel.compiling.regions import CompiledRegion, GraphRegion, inputs_of, outputs_of
from shardwise.parallel.pipeline.cut_points import calls, from_batch, ranges
from shardwise.parallel.tensor.aliasing import writes_in_place
from shardwise.parallel.tensor.partitioner import LocalGraph


@dataclass(frozen=True, slots=True)
class Section:
    """Consecutive part of a step.

    Attributes:
        nodes: its calls, including repeated ones that depend on the batch only.
        tensors: names of the parameters and buffers that it uses.
        given: placeholders of the batch and of constants that it uses.
        inputs: values from earlier sections.
        outputs: values that later sections use, or the results of the step.
    """

    nodes: tuple[fx.Node, ...]
    tensors: tuple[str, ...]
    given: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def sections(local: LocalGraph, at: Sequence[int]) -> list[Section]:
    """Split a graph into sections before the calls with the indices `at`."""
    sequence = calls(local.graph)
    batch = from_batch(local)
    results = next(node for node in local.graph.nodes if node.op == "output").args[0]
    parts = ranges(local, at)
    last = len(parts) - 1
    home = {
        node: index for index, part in enumerate(parts) for node in (sequence[i] for i in part) if node not in batch
    }
    found = []
    for index, part in enumerate(parts):
        own = [sequence[i] for i in part if sequence[i] not in batch]
        returned = list(results) if index == last else []
        nodes = _with_batch_nodes(own, returned, batch, sequence)
        arguments = _unique(argument for node in nodes for argument in node.all_input_nodes)
        holders = [a for a in arguments if a.op == "placeholder"]
        inputs = [a for a in (*arguments, *returned) if a in home and home[a] != index]
        outputs = [n for n in own if any(home.get(user, index) != index for user in n.users)]
        outputs += [n for n in own if n in results and index != last and n not in outputs]
        found.append(
            Section(
                tuple(nodes),
                tuple(_unique(local.step.tensors[a.name] for a in holders if a.name in local.step.tensors)),
                tuple(a for a in holders if a.name not in local.step.tensors),
                tuple(_unique(inputs)),
                tuple(returned) if index == last else tuple(_unique(outputs)),
            )
        )
    return found


def _unique(items: Iterable[Any]) -> list[Any]:
    return list(dict.fromkeys(items))


def _with_batch_nodes(
    own: list[fx.Node], returned: list[fx.Node], batch: set[fx.Node], sequence: list[fx.Node]
) -> list[fx.Node]:
    """Return the section's calls and the calls that they need from the batch alone, in the order of the step."""
    needed = set(own)
    stack = [a for node in own for a in node.all_input_nodes if a in batch] + [n for n in returned if n in batch]
    while stack:
        node = stack.pop()
        if node.op == "call_function" and node not in needed:
            needed.add(node)
            stack += node.all_input_nodes
    return [node for node in sequence if node in needed]


def compiled(
    section: Section, local: LocalGraph, pieces: Sequence[GraphRegion | fx.Node] | None = None
) -> Callable[..., tuple[Any, ...]]:
    """Compile the section to a function: (narrow, tensors, given and inputs, in their order) -> outputs.

    `narrow` returns the bfloat16 copy of a parameter. It is called where the section uses it, so that the gradient of
    the copy is cast at that place of the backward pass.

    The function is straight-line Python. It drops a value after its last use, which frees what autograd does not save.

    Args:
        section: the section.
        local: the worker's graph.
        pieces: the section's calls, with regions that are functions of their own (`compiling.regions`). None: without.
    """
    named = {name: f"t{index}" for index, name in enumerate(section.tensors)}
    names: dict[fx.Node, str] = {}
    for node in local.graph.nodes:
        if node.op == "placeholder" and node.name in local.step.tensors:
            names[node] = named.get(local.step.tensors[node.name], "")
    for index, node in enumerate((*section.given, *section.inputs)):
        names[node] = f"x{index}"
    narrow = {node for node in names if local.step.is_narrow(node)}
    arguments = ["narrow", *named.values(), *(f"x{i}" for i in range(len(section.given) + len(section.inputs)))]
    writer = _Writer(names, narrow)
    if any(writes_in_place(node) and node.args[0] not in _tensor_nodes(local) for node in section.nodes):
        for node in section.inputs:  # a received value must not be overwritten
            writer.lines.append(f"{names[node]} = {names[node]}.clone()")
    writer.write(section.nodes if pieces is None else pieces, section.outputs)
    return writer.function("section", arguments, section.outputs)


def _tensor_nodes(local: LocalGraph) -> set[fx.Node]:
    return {node for node in local.graph.nodes if node.op == "placeholder" and node.name in local.step.tensors}


_REGIONS: dict[Any, CompiledRegion] = {}
"""Regions by their source, constants and shapes: equal blocks of a model are compiled once."""


def function_of(region: GraphRegion) -> CompiledRegion:
    """Return a region as a function of its inputs; one for all equal regions."""
    names = {node: f"a{index}" for index, node in enumerate(region.inputs)}
    writer = _Writer(dict(names), ())
    writer.write(region.nodes, region.outputs)
    source = writer.source("region", list(names.values()), region.outputs)
    constants = tuple((name, repr(value), type(value)) for name, value in writer.scope.items())
    key = source, constants, tuple(str((n.meta.get("shape"), n.meta.get("dtype"))) for n in region.inputs)
    if key not in _REGIONS:
        _REGIONS[key] = CompiledRegion(writer.function("region", list(names.values()), region.outputs))
    return _REGIONS[key]


class _Writer:
    """Writer of calls as lines of Python. A value without a literal form becomes a named constant in `scope`."""

    def __init__(self, names: dict[fx.Node, str], narrow: Collection[fx.Node]) -> None:
        self.names, self.narrow = names, narrow
        self.lines: list[str] = []
        self.scope: dict[str, Any] = {}
        self._known: dict[int, str] = {}
        self._made = 0

    def write(self, pieces: Sequence[GraphRegion | fx.Node], results: Collection[fx.Node]) -> None:
        """Write calls of pieces in order, each followed by the deletion of what is not needed any more."""
        last = {argument: piece for piece in pieces for argument in inputs_of(piece)}
        for piece in pieces:
            made = outputs_of(piece)
            for node in made:
                self.names[node] = f"v{self._made}"
                self._made += 1
            self.lines.append(self._region(piece) if isinstance(piece, GraphRegion) else self._call(piece))
            dead = [node for node in inputs_of(piece) if last[node] is piece and node not in results]
            dead += [node for node in made if node not in last and node not in results]
            if dead:
                self.lines.append("del " + ", ".join(self.names[node] for node in dead))

    def _call(self, node: fx.Node) -> str:
        arguments = [self.literal(argument) for argument in node.args]
        arguments += [f"{key}={self.literal(value)}" for key, value in node.kwargs.items()]
        return f"{self.names[node]} = {self.constant(node.target)}({', '.join(arguments)})"

    def _region(self, region: GraphRegion) -> str:
        results = "".join(f"{self.names[node]}, " for node in region.outputs)
        arguments = ", ".join(map(self.literal, region.inputs))
        return f"{results}= {self.constant(function_of(region))}({arguments})"

    def source(self, name: str, arguments: Sequence[str], results: Sequence[fx.Node]) -> str:
        """Return what was written as the source of a function."""
        returned = "".join(f"{self.names[node]}, " for node in results)
        return "\n    ".join([f"def {name}({', '.join(arguments)}):", *self.lines, f"return ({returned})"])

    def function(
        self, name: str, arguments: Sequence[str], results: Sequence[fx.Node]
    ) -> Callable[..., tuple[Any, ...]]:
        """Return what was written as a function."""
        exec(compile(self.source(name, arguments, results), f"<{name} of a step>", "exec"), self.scope)
        function: Callable[..., tuple[Any, ...]] = self.scope[name]
        return function

    def literal(self, value: Any) -> str:
        if isinstance(value, fx.Node):
            return f"narrow({self.names[value]})" if value in self.narrow else self.names[value]
        if isinstance(value, (list, tuple)):
            inner = "".join(f"{self.literal(item)}, " for item in value)
            return f"[{inner}]" if isinstance(value, list) else f"({inner})"
        if value is None or isinstance(value, (bool, int, str)):
            return repr(value)
        return self.constant(value)

    def constant(self, value: Any) -> str:
        if id(value) not in self._known:
            self._known[id(value)] = f"c{len(self._known)}"
            self.scope[self._known[id(value)]] = value
        return self._known[id(value)]
