"""Group the operations of a graph into the kernels that torch's compiler (inductor) would write for them.

product      matmul, convolution, attention, lookup and all else that a library computes: a kernel of its own
view         another shape of the same memory: free
fused        elementwise operations and reductions: one kernel for all that need no other kernel between them

An elementwise operation whose result two kernels use is computed in both, unless a product needs its result in memory.
Reductions over other dimensions are other kernels; except on a GPU, where one kernel reduces the rows of a matrix and
adds up its columns. So does inductor (torch/_inductor/scheduler.py, `MixOrderReduction`), unless a matrix is so small
that the second kernel finds it in the cache: that is not told apart, so that profiles of all sizes have equal kernels.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

REDUCTIONS = frozenset(
    "sum mean amax amin max min argmax argmin prod any all var var_mean std logsumexp cumsum cumprod".split()
)
"""Names of operations that combine the elements of rows."""

MOVES = frozenset(
    "clone _to_copy copy cat constant_pad_nd full full_like zeros ones zeros_like ones_like scalar_tensor arange iota "
    "convert_element_type slice_scatter select_scatter where scatter flip repeat lift_fresh_copy empty_strided".split()
)
"""Names of operations that are computed element by element, beside those that torch tags as pointwise."""

READS_OF_ROWS = frozenset("gather index".split())
"""Names of lookups that are elementwise in what they read, if that is computed by the same kernel."""

Signature = tuple[tuple[int, bool], ...]


@dataclass(frozen=True, slots=True)
class FusedKernel:
    """A kernel of fused operations.

    Attributes:
        inputs: values that it reads.
        nodes: operations that it computes, in order.
        outputs: values that it writes.
    """

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


Step = fx.Node | FusedKernel
"""A call as it is, or a kernel of fused calls."""


MIXED_COLUMNS = 1 << 14
"""Most columns of a matrix whose rows and columns one kernel of a GPU reduces."""


def grouped(graph: fx.Graph, *, gpu: bool) -> list[Step]:
    """Return the steps that compute a graph, in an order in which each finds its inputs.

    Args:
        graph: calls of ATen operations, with `meta["val"]`.
        gpu: whether a GPU computes it.
    """
    return _Groups(graph, gpu=gpu).steps()


def is_view(node: fx.Node) -> bool:
    """Return whether a call gives another shape of its first argument's memory, or an item of it."""
    if node.target is operator.getitem:
        return True
    target = node.target
    return isinstance(target, torch._ops.OpOverload) and (target.is_view or _name(target) in ("_unsafe_view", "alias"))


@lru_cache(maxsize=4096)
def _name(target: Any) -> str:
    return str(target.overloadpacket.__name__)


def _is_reduction(node: fx.Node) -> bool:
    return isinstance(node.target, torch._ops.OpOverload) and _name(node.target) in REDUCTIONS


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    if not isinstance(target, torch._ops.OpOverload):
        return False
    return torch.Tag.pointwise in target.tags or _name(target) in MOVES


def source(node: fx.Node) -> fx.Node:
    """Return the value whose memory a view shows; another value itself."""
    while node.op == "call_function" and is_view(node):
        node = node.all_input_nodes[0]
    return node


def _signature(node: fx.Node) -> Signature:
    """Return the dimensions of what is reduced, neighbours of one kind as one: (size, whether it is reduced)."""
    shape = tuple(node.all_input_nodes[0].meta["val"].shape)
    given = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim")
    dims: Iterable[Any] = given if isinstance(given, (list, tuple)) else [given]
    wanted = {int(dim) % max(len(shape), 1) for dim in dims if isinstance(dim, int)} or set(range(len(shape)))
    found: list[tuple[int, bool]] = []
    for dim, size in enumerate(shape):
        if found and found[-1][1] == (dim in wanted):
            found[-1] = found[-1][0] * size, found[-1][1]
        elif size > 1:
            found.append((size, dim in wanted))
    return tuple(found)


def _elements(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.numel() if isinstance(value, Tensor) else 0


def _shown(outputs: Iterable[fx.Node]) -> tuple[fx.Node, ...]:
    """Return outputs as tensors: a call with several results is replaced by those that are used."""
    found: list[fx.Node] = []
    for output in outputs:
        items = [user for user in output.users if user.target is operator.getitem]
        found += items or [output]
    return tuple(found)


def _mixed(rows: Signature, columns: Signature) -> bool:
    """Return whether a GPU's kernel that reduces the rows of a matrix may add up its columns, too."""
    if len(rows) != 2 or rows[0][1] or columns != tuple((size, not reduced) for size, reduced in rows):
        return False
    return rows[1][0] <= MIXED_COLUMNS


class _Groups:
    """Groups of the calls of a graph, by number; a call that is not fused is a group of its own."""

    def __init__(self, graph: fx.Graph, *, gpu: bool) -> None:
        self._gpu = gpu
        self._calls = [node for node in graph.nodes if node.op == "call_function"]
        self._number = {node: number for number, node in enumerate(graph.nodes)}
        self._results = next(node for node in graph.nodes if node.op == "output").all_input_nodes
        self._group: dict[fx.Node, int] = {}
        self._members: list[list[fx.Node]] = []
        self._before: list[set[int]] = []
        self._signatures: list[set[Signature]] = []
        self._fuses: list[bool] = []
        for node in self._calls:
            if not is_view(node):
                self._place(node)
        self._join_readers()
        self._written, before = self._in_memory(), -1
        while before < len(self._written):  # until no kernel needs another kernel's sums that are not in memory yet
            before = len(self._written)
            for group in range(len(self._members)):
                self._kernel(group)

    # ---- which group ------------------------------------------------------------------------------------------------

    def _place(self, node: fx.Node) -> None:
        needed = {self._group[each] for each in map(source, node.all_input_nodes) if each in self._group}
        fused, own = self._is_fused(node), {_signature(node)} if _is_reduction(node) else set[Signature]()
        joined = -1
        for each in sorted(needed, reverse=True) if fused else ():
            if joined < 0 and self._fuses[each] and self._may_join(own, each, needed):
                joined = each
            elif joined >= 0 and self._may_merge(joined, each):
                self._merge(joined, each)
                needed = {joined if group == each else group for group in needed}
        if joined < 0:
            joined = len(self._members)
            self._members.append([])
            self._before.append(set())
            self._signatures.append(set())
            self._fuses.append(fused)
        self._group[node] = joined
        self._members[joined].append(node)
        self._before[joined] |= needed - {joined}
        self._signatures[joined] |= own

    def _may_join(self, own: set[Signature], group: int, needed: set[int]) -> bool:
        """Return whether a call, a reduction if it has a signature, may join a group: none comes between them."""
        if not self._agree(own, self._signatures[group]):
            return False
        return all(group not in self._ancestors(each) for each in needed - {group})

    def _may_merge(self, one: int, other: int) -> bool:
        if not self._fuses[other] or not self._agree(self._signatures[one], self._signatures[other]):
            return False
        between = (self._before[one] - {other}) | (self._before[other] - {one})
        return not any({one, other} & self._ancestors(each) for each in between)

    def _agree(self, one: set[Signature], other: set[Signature]) -> bool:
        """Return whether one kernel may have the reductions of both."""
        return all(a == b or (self._gpu and (_mixed(a, b) or _mixed(b, a))) for a in one for b in other)

    def _merge(self, into: int, group: int) -> None:
        """Move the calls of a group into another one. The group stays, empty."""
        self._group.update(dict.fromkeys(self._members[group], into))
        self._members[into] = sorted(self._members[into] + self._members[group], key=self._number.__getitem__)
        self._before[into] |= self._before[group]
        self._signatures[into] |= self._signatures[group]
        self._members[group], self._before[group] = [], set()
        for before in self._before:
            if group in before:
                before -= {group}
                before |= {into}
        self._before[into] -= {into}

    def _is_fused(self, node: fx.Node) -> bool:
        if _is_elementwise(node) or _is_reduction(node):
            return True
        target = node.target
        if isinstance(target, torch._ops.OpOverload) and _name(target) in READS_OF_ROWS:
            read = source(node.all_input_nodes[0])
            return read in self._group and self._fuses[self._group[read]]
        return False

    def _ancestors(self, group: int) -> set[int]:
        found, waiting = set[int](), [group]
        while waiting:
            for each in self._before[waiting.pop()] - found:
                found.add(each)
                waiting.append(each)
        return found

    def _join_readers(self) -> None:
        """Merge groups that read the same whole value, which one kernel then reads once."""
        readers: dict[fx.Node, dict[int, None]] = {}
        for node in self._calls:
            group = -1 if is_view(node) else self._group[node]
            for each in map(source, node.all_input_nodes):
                if group >= 0 and self._fuses[group] and self._group.get(each) != group:
                    readers.setdefault(each, {})[group] = None
        for value, groups in readers.items():
            whole = [group for group in groups if self._members[group] and self._is_whole(value, group)]
            for other in whole[1:]:
                if self._may_merge(whole[0], other):
                    self._merge(whole[0], other)

    def _is_whole(self, value: fx.Node, group: int) -> bool:
        """Return whether a value has as many elements as the largest that a group computes with."""
        sizes = (_elements(each) for node in self._members[group] for each in (node, *node.all_input_nodes))
        return _elements(value) == max(sizes)

    # ---- what a kernel reads and writes -----------------------------------------------------------------------------

    def _in_memory(self) -> set[fx.Node]:
        """Return the fused values that are written to memory: for products, as results, or sums for other kernels."""
        found = {source(result) for result in self._results}
        for node in self._calls:
            if is_view(node):
                continue
            for each in map(source, node.all_input_nodes):
                if each not in self._group or self._group[each] == self._group[node]:
                    continue
                if not self._fuses[self._group[node]] or not _is_elementwise(each):
                    found.add(each)
        return found

    def _kernel(self, group: int) -> FusedKernel | None:
        """Return the kernel of a group; None if nothing of it is needed in memory."""
        outputs = _shown(node for node in self._members[group] if node in self._written)
        inputs: dict[fx.Node, None] = {}
        nodes: set[fx.Node] = set()

        def visit(node: fx.Node) -> None:
            if node in nodes or node in inputs:
                return
            if not self._is_computed_in(group, source(node)):
                inputs[node] = None
                return
            nodes.add(node)
            for argument in node.all_input_nodes:
                visit(argument)

        for output in outputs:
            visit(output)
        self._written.update(origin for origin in map(source, inputs) if origin in self._group)
        ordered = tuple(sorted(nodes, key=self._number.__getitem__))
        return FusedKernel(tuple(inputs), ordered, outputs) if outputs else None

    def _is_computed_in(self, group: int, origin: fx.Node) -> bool:
        """Return whether a group's kernel computes a value itself, be it once more."""
        home = self._group.get(origin)
        if home is None or home == group:
            return home == group
        return self._fuses[home] and _is_elementwise(origin) and origin not in self._written

    # ---- the order --------------------------------------------------------------------------------------------------

    def steps(self) -> list[Step]:
        done: set[fx.Node] = set()
        steps: list[Step] = []

        def show(node: fx.Node) -> None:
            """Add the views that make a value out of those in memory."""
            if node in done or node.op != "call_function" or not is_view(node):
                return
            for each in node.all_input_nodes:
                show(each)
            done.add(node)
            steps.append(node)

        for group in self._ordered():
            kernel: Step | None = self._kernel(group) if self._fuses[group] else self._members[group][0]
            if kernel is None:
                continue
            for needed in needs(kernel):
                show(needed)
            steps.append(kernel)
            done.update(makes(kernel))
        for result in self._results:
            show(result)
        return steps

    def _ordered(self) -> Iterator[int]:
        """Yield the groups so that each comes after those that it needs, else in the order of the graph."""
        waiting = {group for group, members in enumerate(self._members) if members}
        first = {group: self._number[self._members[group][0]] for group in waiting}
        done: set[int] = set()
        while waiting:
            ready = [group for group in waiting if self._before[group] <= done]
            group = min(ready, key=first.__getitem__)
            waiting.remove(group)
            done.add(group)
            yield group


def needs(step: Step) -> Sequence[fx.Node]:
    """Return the values that a step reads."""
    return step.inputs if isinstance(step, FusedKernel) else step.all_input_nodes


def makes(step: Step) -> Sequence[fx.Node]:
    """Return the values that a step makes."""
    return step.outputs if isinstance(step, FusedKernel) else (step,)


def last_uses(steps: Iterable[Step], results: Iterable[fx.Node]) -> Mapping[int, list[fx.Node]]:
    """Return the values that no step after step number n needs, by n."""
    last = {node: number for number, step in enumerate(steps) for node in (*needs(step), *makes(step))}
    found: dict[int, list[fx.Node]] = {}
    for node in last.keys() - set(results):
        found.setdefault(last[node], []).append(node)
    return found
