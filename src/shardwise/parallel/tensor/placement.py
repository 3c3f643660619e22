"""Placement of a value of the step on the tensor-parallel workers.

replicated   every worker has the whole value
sharded      every worker has its part along one dimension; the dimension may consist of several consecutive
             spans, each cut by itself: a fused query, key, value output has three
partial      every worker has a summand: the value is the sum over the workers
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod


@dataclass(frozen=True, slots=True)
class Origin:
    """Dimension of a parameter that a sharded dimension comes from.

    One index of the sharded one is `unit` indices of it.
    """

    tensor: str
    dim: int
    unit: int = 1


@dataclass(frozen=True, slots=True)
class Replicated:
    """Placement of a value that every worker has whole."""


@dataclass(frozen=True, slots=True)
class Partial:
    """Placement of a value of which every worker has a summand."""


@dataclass(frozen=True, slots=True)
class Sharded:
    """Placement of a value cut along `dim`: each worker has its part of every one of the consecutive `spans`.

    `spans` are the sizes of the spans, in elements of that dimension.
    """

    dim: int
    spans: tuple[int, ...]
    origin: Origin | None = None

    def fits(self, ranks: int) -> bool:
        """Return whether there are spans and each can be cut into `ranks` equal parts."""
        return bool(self.spans) and all(size % ranks == 0 for size in self.spans)

    def at(self, dim: int) -> Sharded:
        """Return this placement along another dimension."""
        return Sharded(dim, self.spans, self.origin)


Placement = Replicated | Partial | Sharded
REPLICATED = Replicated()
PARTIAL = Partial()


def local_shape(shape: Sequence[int], placement: Placement, ranks: int) -> tuple[int, ...]:
    """Compute the shape of one worker's part of a tensor of `shape`."""
    if not isinstance(placement, Sharded):
        return tuple(shape)
    return tuple(size // ranks if dim == placement.dim else size for dim, size in enumerate(shape))


def cut_spans(spans: Sequence[int], boundaries: Iterable[int]) -> tuple[int, ...]:
    """Cut spans further at `boundaries`, which count from the start of the first one.

    >>> cut_spans((12,), (4, 8))
    (4, 4, 4)
    """
    ends = set(boundaries)
    position = 0
    for size in spans:
        position += size
        ends.add(position)
    inner = sorted(end for end in ends if 0 < end <= position)
    return tuple(end - start for start, end in zip([0, *inner], inner, strict=False))


def between(spans: Sequence[int], start: int, end: int) -> tuple[int, ...] | None:
    """Return the spans that make up the range from `start` to `end`. Returns None if the range cuts through one."""
    position, inside = 0, []
    for size in spans:
        if start <= position and position + size <= end:
            inside.append(size)
        elif position < end and position + size > start:
            return None
        position += size
    return tuple(inside) if sum(inside) == end - start else None


def regroup(shape: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """Group the dimensions of `shape` with those of `new` that they become in a reshape, in the smallest groups.

    >>> regroup((4, 8, 48), (32, 3, 16))
    [([0, 1], [0]), ([2], [1, 2])]
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(shape) or j < len(new):
        left: list[int] = []
        right: list[int] = []
        a = b = 1
        while (not left and not right) or a != b:
            if (a <= b and i < len(shape)) or j >= len(new):
                left.append(i)
                a *= shape[i]
                i += 1
            else:
                right.append(j)
                b *= new[j]
                j += 1
        groups.append((left, right))
    return groups


def reshaped(
    placement: Sharded, shape: Sequence[int], new: Sequence[int], ranks: int
) -> tuple[Sharded | None, tuple[int, ...] | None]:
    """Follow a sharded dimension through a reshape from `shape` to `new`.

    Returns:
        (placement, None) if it can be followed; (None, spans) if it could be with the dimension cut into those
        spans; (None, None) if it is lost.
    """
    group = next((g for g in regroup(shape, new) if placement.dim in g[0]), None)
    if group is None:
        return None, None
    left, right = group
    outer = prod(shape[d] for d in left if d < placement.dim)
    inner = prod(shape[d] for d in left if d > placement.dim)
    flat = tuple(size * inner for size in placement.spans) * outer
    for dim in right:
        found = _pattern(flat, prod(new[d] for d in right if d < dim), prod(new[d] for d in right if d > dim), ranks)
        if found:
            return Sharded(dim, found, _follow(placement, inner, outer, new, right, dim)), None
    if outer == inner == 1 and len(placement.spans) == 1:
        return None, _wanted(placement.spans[0], new, right, ranks)
    return None, None


def _pattern(flat: tuple[int, ...], outer: int, inner: int, ranks: int) -> tuple[int, ...] | None:
    """Convert the spans `flat` of a flattened group of dimensions to those of one of its dimensions.

    `outer` and `inner` are the numbers of elements before and after that dimension in the group. Returns None if the
    spans do not fit the dimension, or if `ranks` does not divide them.
    """
    if len(flat) % outer:
        return None
    first = flat[: len(flat) // outer]
    if first * outer != flat or any(size % (inner * ranks) for size in first):
        return None
    return tuple(size // inner for size in first)


def _wanted(size: int, new: Sequence[int], right: list[int], ranks: int) -> tuple[int, ...] | None:
    """Return spans of a dimension of `size` that make one of the dimensions `right` shardable after the reshape.

    Returns None if `ranks` divides none of them.
    """
    outer = 1
    for dim in right:
        if outer > 1 and new[dim] % ranks == 0:
            return (size // outer,) * outer
        outer *= new[dim]
    return None


def _follow(
    placement: Sharded, inner: int, outer: int, new: Sequence[int], right: list[int], dim: int
) -> Origin | None:
    """Return the origin in units of the new dimension.

    Returns None if an index of it is no whole run of the origin's indices.
    """
    origin = placement.origin
    after = prod(new[d] for d in right if d > dim)
    before = prod(new[d] for d in right if d < dim)
    if origin is None or outer > 1 or before > 1:
        return None
    unit = origin.unit * after
    return Origin(origin.tensor, origin.dim, unit // inner) if unit % inner == 0 else None
