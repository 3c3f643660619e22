"""Regions of a section: runs of calls without communication, each compiled as one function.

Outside of them stay the exchanges of tensor parallelism, operations of ours (dropout, batch norm over replicas, modules
that were not traced, products whose weight gradients are put off), and what torch's compiler cannot compile as a whole.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor

from shardwise.parallel.compiling.compiler import compile_function
from shardwise.parallel.compiling.fusion import is_view
from shardwise.parallel.compiling.kernels import modelled
from shardwise.parallel.tensor.aliasing import roots, viewed, writes_in_place
from shardwise.parallel.tensor.overlap import linear
from shardwise.parallel.tensor.partitioner import is_local, operation_of
from shardwise.strategy import PRODUCTS
from shardwise.workload.precision import is_for_gpu

OUTSIDE = frozenset(
    "dropout feature_dropout alpha_dropout type_as batch_norm _native_batch_norm_legit instance_norm lstm gru rnn_tanh "
    "rnn_relu lstm_cell gru_cell rnn_tanh_cell rnn_relu_cell _grouped_mm ctc_loss _ctc_loss unique2 nonzero".split()
)
"""Names of operations that are not compiled: they may return their input, change buffers, unroll into thousands of
others, or have results of changing shapes."""

_TRACED_PRODUCTS = frozenset(chain.from_iterable(PRODUCTS.values()))
"""Names of the operations of a traced graph whose results `recompute=selective` saves."""

_UNSTEADY = (torch.Tag.nondeterministic_seeded, torch.Tag.dynamic_output_shape, torch.Tag.data_dependent_output)


@dataclass(frozen=True, slots=True)
class GraphRegion:
    """Calls that are compiled as one function.

    Attributes:
        nodes: the calls, in order.
        inputs: values that it uses.
        outputs: values that are used outside of it.
    """

    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]


def inputs_of(piece: GraphRegion | fx.Node) -> Sequence[fx.Node]:
    """Return the values that a region or a call uses."""
    return piece.inputs if isinstance(piece, GraphRegion) else piece.all_input_nodes


def outputs_of(piece: GraphRegion | fx.Node) -> Sequence[fx.Node]:
    """Return the values that a region or a call gives."""
    return piece.outputs if isinstance(piece, GraphRegion) else (piece,)


def pieces(
    nodes: Sequence[fx.Node], results: Collection[fx.Node], compiled: str, *, again: bool = False
) -> list[GraphRegion | fx.Node]:
    """Cut calls into regions and single calls outside of regions, in order.

    Args:
        nodes: the calls.
        results: values among them that are used elsewhere.
        compiled: what is compiled, see `Strategy.compiled`.
        again: whether the calls are recomputed: the last product is then left out, as recomputation ends before it.
    """
    if not compiled or any(writes_in_place(node) for node in nodes):
        return list(nodes)
    found: list[GraphRegion | fx.Node] = []
    run: list[fx.Node] = []

    def close() -> None:
        if not all(map(is_view, run)):  # views alone are not worth compiling
            found.extend(_region(run, results))
        else:
            found.extend(run)
        run.clear()

    end = next((node for node in reversed(nodes) if is_product(node)), None) if again else None
    for node in nodes:
        if node is not end and is_compiled(node, products=compiled == "all"):
            run.append(node)
        else:
            close()
            found.append(node)
    close()
    return found


def _region(run: Sequence[fx.Node], results: Collection[fx.Node]) -> list[GraphRegion | fx.Node]:
    """Return calls as a region, followed by those that only show others' memory and are used outside.

    A region gives no views: of views that it gave, torch would have to find out again what they are views of.
    """
    inside = set(run)
    wanted = {node for node in run if node in results or any(user not in inside for user in node.users)}
    views: set[fx.Node] = set()
    waiting = list(wanted)
    while waiting:
        node = waiting.pop()
        shown = _shown_by(node)
        if shown is not None and node not in views:
            views.add(node)
            waiting += [shown] if shown in inside else []
        elif shown is None:
            wanted.add(node)
    outputs = tuple(node for node in run if node in wanted - views)
    if not outputs:
        return list(run)
    nodes = tuple(_needed(run, outputs))
    inputs = dict.fromkeys(each for node in nodes for each in node.all_input_nodes if each not in inside)
    return [GraphRegion(nodes, tuple(inputs), outputs), *(node for node in run if node in views)]


def _needed(nodes: Sequence[fx.Node], results: Collection[fx.Node]) -> list[fx.Node]:
    """Return the calls among `nodes` that `results` are computed from, in order."""
    found = set(results)
    for node in reversed(nodes):
        if node in found:
            found.update(node.all_input_nodes)
    return [node for node in nodes if node in found]


def _shown_by(node: fx.Node) -> fx.Node | None:
    """Return the value whose memory a call may show. Returns None if it makes a value of its own."""
    shown = viewed(node)
    return shown if shown is not None and shown.meta.get("dtype") == node.meta.get("dtype") else None


def is_product(node: fx.Node) -> bool:
    """Return whether a call is a product or attention, whose result selective recomputation saves."""
    if is_local(node.target) or node.target is linear:
        return True
    target = operation_of(node.target)
    return target is not None and target.overloadpacket.__name__ in _TRACED_PRODUCTS


def is_compiled(node: fx.Node, *, products: bool) -> bool:
    """Return whether a call belongs into a region."""
    if node.target is operator.getitem:
        return is_compiled(node.all_input_nodes[0], products=products)
    if is_product(node) and not products:
        return False
    if is_local(node.target):
        return True
    target = operation_of(node.target)
    if target is None or target.namespace not in ("aten", "prims"):
        return False
    name = target.overloadpacket.__name__
    if name in OUTSIDE or any(tag in target.tags for tag in _UNSTEADY):
        return False
    if name == "embedding" and any(each is True for each in node.args[3:]):
        return False  # sparse gradients, or scaled by how often a row occurs
    return all(_is_tensor(each) for each in node.all_input_nodes)


def _is_tensor(node: fx.Node) -> bool:
    return node.op != "placeholder" or node.meta.get("shape") is not None or isinstance(node.meta.get("val"), Tensor)


def write_elsewhere(graph: fx.Graph) -> None:
    """Make calls that overwrite a value write their result elsewhere, where nothing else reads that value.

    Changes `graph` in place. What overwrites anything else is left, and then its section is not compiled.
    """
    where = roots(graph)
    for node in graph.nodes:
        written = node.args[0] if node.op == "call_function" and node.args else None
        if not isinstance(written, fx.Node) or not writes_in_place(node) or written.op != "call_function":
            continue
        if len(written.users) > 1 or where[written] is not written or not _of_one_dtype(node):
            continue
        packet = getattr(torch.ops.aten, str(node.target.overloadpacket.__name__)[:-1], None)
        overload = getattr(packet, str(node.target._overloadname), None)
        if overload is not None:
            node.target = overload


def _of_one_dtype(node: fx.Node) -> bool:
    return len({each.meta.get("dtype") for each in node.all_input_nodes}) == 1


class CompiledRegion:
    """A region as a function: compiled where gradients are computed, and modelled on tensors without data.

    Args:
        function: the function, straight-line Python.
    """

    def __init__(self, function: Callable[..., tuple[Any, ...]]) -> None:
        self._plain = function
        self._compiled: Callable[..., tuple[Any, ...]] | None = None
        self._modelled: dict[tuple[Any, ...], Callable[..., tuple[Any, ...]]] = {}

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """Compute the outputs of the region."""
        if not torch.is_grad_enabled():
            return self._plain(*arguments)
        if any(isinstance(each, FakeTensor) for each in arguments):
            return self.modelled(arguments)(*arguments)
        if self._compiled is None:
            self._compiled = compile_function(self._plain)
        return self._compiled(*arguments)

    @property
    def is_compiled(self) -> bool:
        """Return whether calls so far have compiled it."""
        return self._compiled is not None

    def modelled(self, arguments: Sequence[Any]) -> Callable[..., tuple[Any, ...]]:
        """Return the function for arguments like these on tensors without data, see `kernels.modelled`."""
        kinds = ((each.requires_grad, each.device) if isinstance(each, Tensor) else each for each in arguments)
        key = is_for_gpu(), *kinds
        if key not in self._modelled:
            self._modelled[key] = modelled(self._plain, arguments)
        return self._modelled[key]
