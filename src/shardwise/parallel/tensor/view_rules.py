"""Tensor-parallel rules of operations that move elements without computing: reshapes, permutations, slices, joins.

A sharded dimension is followed through them. If it could be followed only with a parameter's dimension cut into other
spans (the query, key and value of one fused matrix), the partitioner records those spans for its next pass.
"""

from __future__ import annotations

from itertools import accumulate, pairwise
from math import prod
from typing import Any

import torch
from torch import fx

from shardwise.parallel.tensor.partitioner import Obstacle, Partitioner, PlacedValue, Rule
from shardwise.parallel.tensor.placement import Placement, Sharded, between, cut_spans, local_shape, reshaped

aten = torch.ops.aten


def reshape(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """view, reshape, flatten, unflatten, squeeze, unsqueeze: all are a reshape to the traced shape."""
    x, like = p.settled(args[0]), node.meta["val"]
    placement: Placement = x.placement
    if isinstance(placement, Sharded) and like.numel() > 0:
        followed, wanted = reshaped(placement, x.shape, tuple(like.shape), p.ranks)
        if followed is None:
            _missed(p, x, placement, tuple(like.shape), wanted)
            x = p.replicated(x)
        placement = followed or x.placement
    shape = local_shape(tuple(like.shape), placement, p.ranks)
    return p.emit(aten.reshape.default, (x, shape), like=like, placement=placement)


def _missed(
    p: Partitioner, x: PlacedValue, placement: Sharded, new: tuple[int, ...], wanted: tuple[int, ...] | None
) -> None:
    """Record the spans that would make a reshape work.

    Without such spans, record a head count that the degree does not divide.
    """
    if wanted is not None:
        p.learn(placement.origin, wanted)
        return
    size = x.shape[placement.dim]
    start = prod(x.shape[: placement.dim])
    for dim in range(len(new)):
        if prod(new[:dim]) == start and 1 < new[dim] < size and size % new[dim] == 0:
            p.obstacles.append(Obstacle("heads", new[dim]))


def permute(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """permute, transpose, t, movedim: a small meta tensor with distinct sizes shows where each dimension goes."""
    x, like = args[0], node.meta["val"]
    probe = torch.empty(tuple(range(2, 2 + len(x.shape))), device="meta")
    order = [size - 2 for size in node.target(probe, *args[1:], **kwargs).shape]  # type: ignore[operator]
    if p.takes_form(x):
        return p.form(node.target, args, kwargs, like=like, dims=order)  # type: ignore[arg-type]
    x = p.settled(x)
    placement: Placement = x.placement
    if isinstance(placement, Sharded):
        placement = placement.at(order.index(placement.dim))
    return p.emit(node.target, (x, *args[1:]), kwargs, like=like, placement=placement)  # type: ignore[arg-type]


def unsqueeze(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """unsqueeze: insert a dimension of size one."""
    x, like = args[0], node.meta["val"]
    if not p.takes_form(x):
        return reshape(p, node, args, kwargs)
    dims: list[int | None] = list(range(len(x.shape)))
    dims.insert(args[1] % like.dim(), None)
    return p.form(node.target, args, kwargs, like=like, dims=dims)  # type: ignore[arg-type]


def expand(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """expand: repeat dimensions of size one.

    The index of the sharded dimension grows by the number of new leading dimensions.
    """
    x, like = p.settled(args[0]), node.meta["val"]
    placement: Placement = x.placement
    if isinstance(placement, Sharded):
        placement = placement.at(placement.dim + like.dim() - len(x.shape))
    shape = local_shape(tuple(like.shape), placement, p.ranks)
    return p.emit(aten.expand.default, (x, shape), like=like, placement=placement)


def repeat(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """repeat: computed on the shards unless the sharded dimension itself is repeated."""
    x, like = p.settled(args[0]), node.meta["val"]
    placement = x.placement
    if not isinstance(placement, Sharded):
        return p.emit(node.target, (x, *args[1:]), kwargs, like=like)  # type: ignore[arg-type]
    dim = placement.dim + like.dim() - len(x.shape)
    if args[1][dim] != 1:
        return p.fallback(node, args, kwargs, "repeat along a sharded dimension")
    return p.emit(node.target, (x, *args[1:]), kwargs, like=like, placement=placement.at(dim))  # type: ignore[arg-type]


def repeat_interleave(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """repeat_interleave(x, n, dim): along the sharded dimension every span becomes n times as long."""
    x, like = p.settled(args[0]), node.meta["val"]
    times, dim = args[1], args[2] if len(args) > 2 else kwargs.get("dim")
    placement = x.placement
    if isinstance(times, PlacedValue) or dim is None or not isinstance(placement, Sharded):
        return p.fallback(node, args, kwargs, "repeat_interleave by a tensor")
    if dim % len(x.shape) == placement.dim:
        placement = Sharded(placement.dim, tuple(size * times for size in placement.spans))
    return p.emit(aten.repeat_interleave.self_int, (x, times, dim), like=like, placement=placement)


def select(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """x[:, i]: remove a dimension, which must not be sharded."""
    x, like = args[0], node.meta["val"]
    dim = args[1] % len(x.shape)
    if p.takes_form(x):
        others = [other for other in range(len(x.shape)) if other != dim]
        return p.form(node.target, args, kwargs, like=like, dims=others)  # type: ignore[arg-type]
    x = p.settled(x)
    placement = x.placement
    if isinstance(placement, Sharded):
        if placement.dim == dim:
            p.learn(placement.origin, (1,) * x.shape[dim])
            return p.fallback(node, args, kwargs, "one index of a sharded dimension is taken")
        placement = placement.at(placement.dim - (placement.dim > dim))
    return p.emit(node.target, (x, *args[1:]), kwargs, like=like, placement=placement)  # type: ignore[arg-type]


def index(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """x[i, j, :]: dimensions without an index stay as they are."""
    x, like = args[0], node.meta["val"]
    given = [None if item is None else p.replicated(item) for item in args[1]]
    given += [None] * (len(x.shape) - len(given))
    at = [dim for dim, item in enumerate(given) if item is not None]
    if any(value.dtype is torch.bool for value in given if value is not None):
        return p.fallback(node, args, kwargs, "a mask takes elements of it")
    kept = [dim for dim in range(len(x.shape)) if dim not in at]
    new = like.dim() - len(kept)
    together = at == list(range(at[0], at[0] + len(at)))
    before = at[0] if together else 0  # torch puts the dimensions of non-adjacent indices first
    dims = [*kept[:before], *[None] * new, *kept[before:]]
    return _selected(p, node, [x, given, *args[2:]], kwargs, dims)


def index_select(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """index_select(x, dim, index): all other dimensions are independent."""
    x, dim = args[0], args[1] % len(args[0].shape)
    dims = [None if other == dim else other for other in range(len(x.shape))]
    return _selected(p, node, [x, dim, p.replicated(args[2])], kwargs, dims)


def _selected(
    p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any], dims: list[int | None]
) -> PlacedValue:
    """Emit an indexing operation on `args[0]`.

    `dims` maps each result dimension to its input dimension; None: made by an index.
    """
    x, like = args[0], node.meta["val"]
    if p.takes_form(x):
        return p.form(node.target, args, kwargs, like=like, dims=dims)  # type: ignore[arg-type]
    labels = tuple(f"x{dim}" if dim in dims else None for dim in range(len(x.shape)))
    output = tuple(None if dim is None else f"x{dim}" for dim in dims)
    return p.labelled(node.target, args, kwargs, {0: labels}, output, like=like)  # type: ignore[arg-type]


def gather(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """gather(x, dim, index): dimensions in which both have the same size are independent, except `dim`."""
    x, dim, where, *rest = args
    dim %= max(len(x.shape), 1)
    labels = tuple(
        None if other == dim or size != where.shape[other] else f"x{other}" for other, size in enumerate(x.shape)
    )
    full = [x, dim, where, *rest]
    return p.labelled(node.target, full, kwargs, {0: labels, 2: labels}, labels, like=node.meta["val"])  # type: ignore[arg-type]


def slice_(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """x[:, start:end:step]: a slice along the sharded dimension must consist of whole spans."""
    x, like = p.settled(args[0]), node.meta["val"]
    dim = (args[1] if len(args) > 1 else 0) % len(x.shape)
    placement = x.placement
    if not isinstance(placement, Sharded) or placement.dim != dim:
        return p.emit(node.target, (x, *args[1:]), kwargs, like=like, placement=placement)  # type: ignore[arg-type]
    size, step = x.shape[dim], args[4] if len(args) > 4 else 1
    start, end = (_clamped(args[i] if len(args) > i else None, size, other) for i, other in ((2, 0), (3, size)))
    inside = between(placement.spans, start, end) if step == 1 else None
    if inside is None:
        if step == 1:
            p.learn(placement.origin, cut_spans(placement.spans, (start, end)))
        return p.fallback(node, args, kwargs, "a slice of a sharded dimension")
    origin = placement.origin if (start, end) == (0, size) else None
    local = (start // p.ranks, end // p.ranks)
    return p.emit(aten.slice.Tensor, (x, dim, *local), like=like, placement=Sharded(dim, inside, origin))


def _clamped(value: int | None, size: int, default: int) -> int:
    if value is None:
        return default
    return max(0, min(size, value + size if value < 0 else value))


def split(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """split, chunk, split_with_sizes: along the sharded dimension the parts must consist of whole spans."""
    x, likes = args[0], list(node.meta["val"])
    dim = (args[2] if len(args) > 2 else kwargs.get("dim", 0)) % len(x.shape)
    sizes = [like.shape[dim] for like in likes]
    if p.ranks > 1 and p.undecided(x) and len(x.shape) > 1 and all(size % p.ranks == 0 for size in sizes):
        x = p.sharded(x, dim, tuple(sizes))  # a weight split before its use: shard each part
    x = p.settled(x)
    placement = x.placement
    if not isinstance(placement, Sharded) or placement.dim != dim:
        return p.emit_many(
            aten.split_with_sizes.default, (x, sizes, dim), like=likes, placements=[placement] * len(likes)
        )
    bounds = list(accumulate(sizes, initial=0))
    parts = [between(placement.spans, start, end) for start, end in pairwise(bounds)]
    if any(part is None or not Sharded(dim, part).fits(p.ranks) for part in parts):
        p.learn(placement.origin, cut_spans(placement.spans, bounds))
        x = p.replicated(x)
        return p.emit_many(
            aten.split_with_sizes.default, (x, sizes, dim), like=likes, placements=[x.placement] * len(likes)
        )
    local = [size // p.ranks for size in sizes]
    placements = [Sharded(dim, part) for part in parts if part is not None]
    return p.emit_many(aten.split_with_sizes.default, (x, local, dim), like=likes, placements=placements)


def unbind(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> Any:
    """unbind: the unbound dimension must not be sharded."""
    x, likes = p.settled(args[0]), list(node.meta["val"])
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % len(x.shape)
    placement = x.placement
    if isinstance(placement, Sharded) and placement.dim == dim:
        p.learn(placement.origin, (1,) * x.shape[dim])
        x = p.replicated(x)
        placement = x.placement
    if isinstance(placement, Sharded):
        placement = placement.at(placement.dim - (placement.dim > dim))
    return p.emit_many(aten.unbind.int, (x, dim), like=likes, placements=[placement] * len(likes))


def cat(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """cat: along the sharded dimension the spans are concatenated too."""
    like = node.meta["val"]
    values = [p.settled(value) for value in args[0] if tuple(value.shape) != (0,)]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % like.dim()
    first = next((v.placement for v in values if isinstance(v.placement, Sharded)), None)
    if first is not None and first.dim == dim:
        along = [v.placement if isinstance(v.placement, Sharded) and v.placement.dim == dim else None for v in values]
        spans = [(v.shape[dim],) if at is None else at.spans for v, at in zip(values, along, strict=True)]
        if all(size % p.ranks == 0 for each in spans for size in each):
            parts = [p.sharded(v, dim, s) for v, s in zip(values, spans, strict=True)]
            joined = Sharded(dim, tuple(size for each in spans for size in each))
            return p.emit(aten.cat.default, (parts, dim), like=like, placement=joined)
        first = None
    if first is not None:
        parts = [p.sharded(v, first.dim, first.spans, first.origin) for v in values]
        return p.emit(aten.cat.default, (parts, dim), like=like, placement=first)
    return p.emit(aten.cat.default, ([p.replicated(v) for v in values], dim), like=like)


def stack(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """stack: the new dimension is never sharded."""
    like = node.meta["val"]
    values = [p.settled(value) for value in args[0]]
    dim = (args[1] if len(args) > 1 else kwargs.get("dim", 0)) % like.dim()
    first = next((v.placement for v in values if isinstance(v.placement, Sharded)), None)
    if first is None:
        return p.emit(aten.stack.default, (values, dim), like=like)
    parts = [p.sharded(v, first.dim, first.spans, first.origin) for v in values]
    return p.emit(aten.stack.default, (parts, dim), like=like, placement=first.at(first.dim + (first.dim >= dim)))


def complex_view(p: Partitioner, node: fx.Node, args: list[Any], kwargs: dict[str, Any]) -> PlacedValue:
    """view_as_complex (..., 2) -> (...), and view_as_real in reverse: all other dimensions are unchanged."""
    x, like = args[0], node.meta["val"]
    lead = min(len(x.shape), like.dim())
    labels = tuple(f"b{dim}" for dim in range(lead))
    inputs = {0: (*labels, *(None,) * (len(x.shape) - lead))}
    return p.labelled(node.target, args, kwargs, inputs, (*labels, *(None,) * (like.dim() - lead)), like=like)  # type: ignore[arg-type]


RESHAPES = ("view", "_unsafe_view", "reshape", "flatten", "unflatten", "squeeze", "view_as", "reshape_as")
PERMUTATIONS = (
    *("permute", "transpose", "t", "movedim", "moveaxis", "swapaxes", "swapdims"),
    *("numpy_T", "mT", "mH", "matrix_H", "adjoint"),
)
RULES: dict[str, Rule] = {
    **dict.fromkeys(RESHAPES, reshape),
    **dict.fromkeys(PERMUTATIONS, permute),
    **dict.fromkeys(("expand", "expand_as"), expand),
    **dict.fromkeys(("split", "split_with_sizes", "chunk", "tensor_split", "unsafe_chunk", "unsafe_split"), split),
    "unsqueeze": unsqueeze,
    "repeat": repeat,
    "repeat_interleave": repeat_interleave,
    "select": select,
    "index": index,
    "index_select": index_select,
    "gather": gather,
    "slice": slice_,
    "unbind": unbind,
    "cat": cat,
    "concat": cat,
    "concatenate": cat,
    "stack": stack,
    "view_as_complex": complex_view,
    "view_as_real": complex_view,
}
