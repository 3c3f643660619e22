"""Find output layers with their cross entropies in a worker's graph, and make each one call that cuts the tokens.

    before    x -> linear -> casts, reshapes, slices along the tokens -> cross entropy
    after     x -> reshapes, slices along the tokens -> loss in pieces (`parallel.operators.piecewise_loss`)

What moves tokens of the logits moves those of `x` as well, which has features in place of classes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod
from typing import Any

import torch
from torch import Tensor, fx

from shardwise.errors import StrategyError
from shardwise.parallel.tensor import vocab_parallel
from shardwise.parallel.tensor.aliasing import roots, writes_in_place
from shardwise.parallel.tensor.compute_rules import biased_product
from shardwise.parallel.tensor.partitioner import LocalGraph, operation_of
from shardwise.parallel.tensor.view_rules import PERMUTATIONS

aten = torch.ops.aten

COPIES = frozenset("to _to_copy float type contiguous clone alias".split())
"""Names of operations that change at most the dtype."""

MOVES = frozenset(("reshape", "slice", "select"))
"""Names of operations that move or leave out tokens; all that reshape are `reshape` in a worker's graph."""

REDUCED = (1, 2)
"""Numbers that torch gives the reductions `mean` and `sum`."""


_DEFAULTS: tuple[Any, ...] = (None, None, None, 1, -100, 0.0)
"""Default values of the arguments of torch's cross entropy: class weights, reduction, ignored target, smoothing."""


@dataclass(frozen=True, slots=True)
class _Loss:
    """Cross entropy of logits with class indices.

    Attributes:
        logits: the logits, (tokens, classes) or (samples, classes, tokens, ...).
        target: the class indices.
        spans: spans of the classes that workers share; empty if each has all of them.
        options: reduction, target that is ignored, label smoothing.
    """

    logits: fx.Node
    target: fx.Node
    spans: tuple[int, ...]
    options: tuple[int, int, float]


@dataclass(frozen=True, slots=True)
class _Layer:
    """Output layer. `transposed` says that its weight is (features, classes)."""

    x: fx.Node
    weight: fx.Node
    bias: fx.Node | None = None
    transposed: bool = False


@dataclass(frozen=True, slots=True)
class _Move:
    """Call that moves tokens: its target, its arguments after the first, and the shape of what it gives."""

    target: Any
    rest: tuple[Any, ...]
    shape: tuple[int, ...]


def cut_loss(local: LocalGraph, pieces: int, function: Callable[..., Tensor]) -> int:
    """Compute output layers and their cross entropies in pieces of the tokens.

    Changes the graph of a training step in place, and leaves that of an evaluation. Where there are fewer tokens than
    pieces, each token is a piece.

    Args:
        local: this worker's graph.
        pieces: number of pieces; 0: whole.
        function: `GraphOperators.loss_in_pieces`.

    Returns:
        the number of tokens of the cross entropy that has the fewest; 0 if nothing is cut.

    Raises:
        StrategyError: the graph has no such layer.
    """
    if not pieces or not local.step.training:
        return 0
    tokens = [_cut(local.graph, node, pieces, function) for node in list(local.graph.nodes)]
    if not any(tokens):
        raise StrategyError(
            f"loss_pieces={pieces} needs a linear layer whose outputs go to a cross entropy and nowhere else: with "
            "class indices, without class weights, reduced to a mean or a sum, and under tp of a vocabulary that its "
            "degree divides; this step has none, leave loss_pieces out"
        )
    return min(filter(None, tokens))


def _cut(graph: fx.Graph, node: fx.Node, pieces: int, function: Callable[..., Tensor]) -> int:
    """Replace a cross entropy and the layer before it. Returns its tokens; 0 if `node` is none that can be replaced."""
    loss = _loss_of(node)
    line = [] if loss is None else _line(loss.logits)
    layer = _layer_of(line[0]) if line else None
    if loss is None or layer is None or any(len(each.users) > 1 for each in line):
        return 0
    moves = _moves(line, layer, loss.target.meta["shape"])
    if moves is None or _overwritten(graph, line[0], node):
        return 0
    with graph.inserting_before(node):
        x, weight = layer.x, layer.weight
        for move in moves:
            x = _called(graph, move.target, (x, *move.rest), like=x, shape=move.shape)
        if layer.transposed:
            weight = _called(graph, aten.t.default, (weight,), like=weight, shape=weight.meta["shape"][::-1])
        arguments = (pieces, (x, weight, layer.bias), loss.target, loss.spans, loss.options, node.meta["dtype"])
        node.replace_all_uses_with(_called(graph, function, arguments, like=node, shape=()))
    for each in (node, *reversed(line)):
        graph.erase_node(each)
    return prod(loss.target.meta["shape"])


def _called(graph: fx.Graph, target: Any, args: tuple[Any, ...], *, like: fx.Node, shape: tuple[int, ...]) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta.update(like.meta, shape=shape)
    return made


def _loss_of(node: fx.Node) -> _Loss | None:
    """Return a call as a cross entropy that can be cut into pieces. Returns None if it is none."""
    arguments: list[Any] = [*node.args]
    if node.target is aten.cross_entropy_loss.default and not node.kwargs:
        logits, target, weight, *options = (*arguments, *_DEFAULTS[len(arguments) :])
        spans: tuple[int, ...] = ()
    elif getattr(node.target, "func", None) is vocab_parallel.cross_entropy:
        logits, target, spans, *options = arguments
        weight = None
    else:
        return None
    if weight is not None or options[0] not in REDUCED or target.meta["dtype"].is_floating_point:
        return None
    return _Loss(logits, target, tuple(spans), tuple(options))


def _layer_of(node: fx.Node) -> _Layer | None:
    """Return a call as a linear layer with a matrix as its weight. Returns None if it is none."""
    name, arguments = _name(node), list[Any](node.args)
    if name == "linear":
        layer = _Layer(*arguments)
    elif name in ("matmul", "mm") or node.target is biased_product:
        x, weight, bias = (*arguments, None)[:3]
        layer = _Layer(x, weight, bias, transposed=True)
    else:
        return None
    bias = () if layer.bias is None else layer.bias.meta["shape"]
    fits = len(layer.weight.meta["shape"]) == 2 and len(layer.x.meta["shape"]) > 1 and len(bias) < 2
    return layer if fits else None


def _line(logits: fx.Node) -> list[fx.Node]:
    """Return the calls from which `logits` come, in order, up to the first that is no copy and moves no tokens."""
    line = [logits]
    while _name(line[0]) in (*COPIES, *MOVES, *PERMUTATIONS):
        line.insert(0, line[0].args[0])  # type: ignore[arg-type]
    return line


def _moves(line: Sequence[fx.Node], layer: _Layer, target: tuple[int, ...]) -> list[_Move] | None:
    """Return the calls by which the inputs of a layer become one for each target, as its outputs do along `line`.

    Returns None if the classes do not stay a dimension of their own, or values are narrowed.
    """
    features = layer.x.meta["shape"][-1]
    moves: list[_Move] = []
    along = len(line[0].meta["shape"]) - 1  # dimension of the classes
    for before, node in pairwise(line):
        old, new, name = before.meta["shape"], node.meta["shape"], _name(node)
        if name in COPIES:
            if node.meta["dtype"].itemsize < before.meta["dtype"].itemsize:
                return None
        elif name in PERMUTATIONS:
            order = _order(node, len(old))
            if [dim for dim in order if dim != along] != [dim for dim in range(len(old)) if dim != along]:
                return None
            along = order.index(along)
        elif name == "reshape":
            if along != len(old) - 1 or new[-1] != old[-1]:
                return None
            along = len(new) - 1
            shape = (*new[:-1], features)
            moves.append(_Move(aten.reshape.default, (shape,), shape))
        else:
            wanted, *rest = list[Any](node.args[1:]) or [0]
            dim = wanted % len(old)
            if dim == along:
                return None
            there = dim - (dim > along)
            along -= name == "select" and dim < along
            moves.append(_Move(node.target, (there, *rest), (*new[:along], *new[along + 1 :], features)))
    rows = moves[-1].shape[:-1] if moves else layer.x.meta["shape"][:-1]
    return moves if along == 1 and tuple(rows) == tuple(target) else None


def _order(node: fx.Node, count: int) -> list[int]:
    """Return which dimension of its input each dimension of a permutation is."""
    probe = torch.empty(tuple(range(2, 2 + count)), device="meta")
    return [size - 2 for size in node.target(probe, *node.args[1:], **node.kwargs).shape]  # type: ignore[operator]


def _overwritten(graph: fx.Graph, first: fx.Node, last: fx.Node) -> bool:
    """Return whether a value that call `first` uses is overwritten before call `last`."""
    where = roots(graph)
    used = {where[each] for each in first.all_input_nodes}
    nodes = list(graph.nodes)
    between = nodes[nodes.index(first) : nodes.index(last)]
    return any(writes_in_place(node) and where[node] in used for node in between)


def _name(node: fx.Node) -> str:
    operation = operation_of(node.target) if node.op == "call_function" else None
    return "" if operation is None or operation.namespace != "aten" else str(operation.overloadpacket.__name__)
