"""Gradient buckets, and blocks of parameters that `fully_shard` gathers together."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

from shardwise.predict.profile.profile import Parameter, Profile, module_blocks
from shardwise.predict.workers.cuts import recomputed_segments
from shardwise.splitting.buckets import bucket_bytes
from shardwise.strategy import Strategy

Shape = tuple[int, ...]

FIRST_BUCKET_BYTES = 2**20
"""Bytes of DDP's first bucket (Li et al. 2020; torch/csrc/distributed/c10d/reducer.hpp: kDefaultFirstBucketBytes)."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are all-reduced together, as soon as the backward pass is through segment `ready`.

    Attributes:
        bytes: bytes of their parameters.
        ready: the segment.
        shapes: shapes of those that are compressed, in order; the others are sent exactly.
    """

    bytes: int
    ready: int
    shapes: tuple[Shape, ...] = ()


@dataclass(frozen=True, slots=True)
class Gathered:
    """Parameters that `fully_shard` gathers together.

    Attributes:
        gather: bytes of the gathered parameters, with padding.
        reduce: bytes of their gradients before the reduce-scatter, with padding; 0 if none is trained.
        parameters: bytes of the parameters, without padding.
        shapes: shapes of those whose gradients are compressed, in order; the others are sent exactly.
    """

    gather: int
    reduce: int
    parameters: int
    shapes: tuple[Shape, ...] = ()


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive segments that are gathered, freed and recomputed together.

    Attributes:
        first, end: its range of segments.
        gathered: its parameters; None without `fully_shard`.
        recomputed: whether its activations are dropped and recomputed.
    """

    first: int
    end: int
    gathered: Gathered | None = None
    recomputed: bool = False


def coalesced(parameters: Iterable[Parameter], limits: Sequence[int]) -> list[int]:
    """Return the bytes of torch's buckets, which close once they reach the limit and hold one element size each."""
    return [bucket.bytes for bucket in _assigned(parameters, limits)]


def _assigned(parameters: Iterable[Parameter], limits: Sequence[int], strategy: Strategy | None = None) -> list[Bucket]:
    """Return torch's buckets (c10d: compute_bucket_assignment_by_size), ready after their smallest first segment.

    `limits` are the bytes at which successive buckets close; the last one holds for all further buckets.
    """
    done: list[Bucket] = []
    filling: dict[int, list[Parameter]] = {}
    sizes: dict[int, int] = {}
    used: dict[int, int] = {}
    for parameter in parameters:
        kind = parameter.itemsize
        filling.setdefault(kind, []).append(parameter)
        sizes[kind] = sizes.get(kind, 0) + parameter.bytes
        number = used.get(kind, 0)
        if sizes[kind] >= limits[min(number, len(limits) - 1)]:
            done.append(_bucket(filling.pop(kind), sizes.pop(kind), strategy))
            used[kind] = number + 1
    return done + [_bucket(left, sizes[kind], strategy) for kind, left in filling.items()]


def _bucket(parameters: Sequence[Parameter], size: int, strategy: Strategy | None) -> Bucket:
    return Bucket(size, min(each.segments[0] for each in parameters), _compressed(parameters, strategy))


def _compressed(parameters: Iterable[Parameter], strategy: Strategy | None) -> tuple[Shape, ...]:
    """Return the shapes of the gradients that a strategy compresses; see `CompressedReducer.exact` for the others."""
    if strategy is None or not strategy.compress:
        return ()
    return tuple(each.shape for each in parameters if not each.kept and (strategy.tp == 1 or each.cut or each.summed))


def reducer_buckets(
    parameters: Sequence[Parameter], first: int, limit: int, strategy: Strategy | None = None
) -> list[Bucket]:
    """Return the buckets of `gradient_reducer.GradientReducer`; `strategy` says what of them is compressed.

    A parameter's gradient is complete when the backward pass is through its first segment from `first` on.
    """
    buckets: list[list[Parameter]] = []
    size, kind = 0, 0
    for parameter in reversed(parameters):
        if not buckets or size + parameter.bytes > limit or parameter.itemsize != kind:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size, kind = size + parameter.bytes, parameter.itemsize
    return [
        Bucket(
            sum(p.bytes for p in bucket),
            min(next((k for k in p.segments if k >= first), first) for p in bucket),
            _compressed(bucket, strategy),
        )
        for bucket in buckets
    ]


def stage_buckets(
    profile: Profile, strategy: Strategy, own: Sequence[int], twice: set[int], first: int, *, module: bool
) -> list[Bucket]:
    """Return the buckets of a stage's gradients, in the order in which they are complete."""
    if strategy.summing == 1 or strategy.ps:
        return []
    parameters, limit = profile.parameters, bucket_bytes(strategy.bucket)
    if strategy.splits_parameters:
        whole = [parameters[i] for i in own if parameters[i].trained and parameters[i].whole and i not in twice]
        if module:
            return [Bucket(sum(parameter.bytes for parameter in whole), 0)] if whole else []
        return reducer_buckets(whole, first, limit) if whole else []
    if module:
        ready = [parameters[index] for index in profile.ready]
        limits = [limit] if strategy.bucket else [FIRST_BUCKET_BYTES, limit]
        return _assigned(ready, limits, strategy)
    trained = [parameters[i] for i in own if parameters[i].trained and i not in twice]
    return reducer_buckets(trained, first, limit, strategy)


def module_parts(
    profile: Profile, strategy: Strategy, ranges: tuple[tuple[int, int], ...], own: Sequence[int]
) -> tuple[tuple[Block, ...], Gathered | None]:
    """Return (blocks, root) of a module that runs as it is.

    The blocks are the module's repeated blocks. All between them belongs to the root and is not recomputed.
    """
    inside = {index for block in profile.blocks for index in block}
    sharded = strategy.splits_parameters
    again = len(recomputed_segments(profile, strategy, (), 0))
    blocks = []
    for number, (block, (first, end)) in enumerate(zip(profile.blocks, module_blocks(profile), strict=True)):
        gathered = _gathered(profile, block, strategy) if sharded else None
        blocks.append(Block(first, end, gathered, number < again))
    root = _gathered(profile, [index for index in own if index not in inside], strategy) if sharded else None
    return tuple(sorted(blocks, key=lambda block: block.first)), root


def graph_parts(
    profile: Profile, strategy: Strategy, ranges: tuple[tuple[int, int], ...], own: Sequence[int]
) -> tuple[tuple[Block, ...], Gathered | None]:
    """Return (blocks, root) of a stage of a traced graph.

    The blocks are consecutive ranges of segments. Parameters that several of them use belong to the root.
    """
    sharded, starts = strategy.splits_parameters, [first for first, _ in ranges]
    again = set(recomputed_segments(profile, strategy, starts, ranges[-1][1]))
    groups: Sequence[Gathered | None] = [None] * (len(ranges) + 1)
    if sharded:
        key = ("gathered", ranges, strategy.fsdp, bool(strategy.compress))
        groups = profile.memo.once(key, lambda: _gathered_apart(profile, strategy, ranges, own))
    blocks = (Block(a, b, group, (a, b) in again) for (a, b), group in zip(ranges, groups[:-1], strict=True))
    return tuple(blocks), groups[-1]


def _gathered_apart(
    profile: Profile, strategy: Strategy, ranges: Sequence[tuple[int, int]], own: Sequence[int]
) -> tuple[Gathered | None, ...]:
    """Return the parameters gathered for each range of segments, then the group of those that several ranges use."""
    several = Counter(index for a, b in ranges for index in profile.within(a, b))
    alone = [[index for index in profile.within(a, b) if several[index] == 1] for a, b in ranges]
    shared = [index for index in own if several[index] > 1]
    return tuple(_gathered(profile, indices, strategy) for indices in [*alone, shared])


def _gathered(profile: Profile, indices: Iterable[int], strategy: Strategy) -> Gathered | None:
    """Build a group of `fully_shard`, which pads rows so that all ranks hold equally many.

    Returns None if nothing is gathered.
    """
    gather = reduce = size = 0
    trained = []
    for index in indices:
        parameter = profile.parameters[index]
        if parameter.buffer or parameter.whole or not parameter.shape[0]:
            continue
        rows = parameter.bytes // parameter.shape[0]
        padded = strategy.fsdp * ceil(parameter.shape[0] / strategy.fsdp) * rows
        gather += padded
        reduce += padded if parameter.trained else 0
        size += parameter.bytes
        if parameter.trained:
            trained.append(parameter)
    return Gathered(gather, reduce, size, _compressed(trained, strategy)) if size else None
