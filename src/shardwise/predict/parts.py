"""Division of a workload over the workers of a strategy: stages, blocks, buckets and shards, with their bytes.

It repeats the decisions of `parallel` about cuts and communication, from a profile instead of a module:

    ModuleEngine   (tp = pp = 1)    one stage; DDP's buckets, or `fully_shard` on the module's repeated blocks
    GraphEngine    (tp or pp)       stages and blocks cut by cost; buckets of `gradient_reducer.GradientReducer`, or
    `fully_shard`

Segments are known by their index in `Profile.links`; a range from `first` to `end` excludes `end`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from shardwise.collective import Group
from shardwise.errors import StrategyError
from shardwise.predict.profile.profile import Parameter, Profile, Value, module_blocks
from shardwise.splitting.balance import blocks_from, check_stages, cuts_blocks, stage_starts
from shardwise.splitting.buckets import bucket_bytes
from shardwise.splitting.ownership import BUCKET_BYTES as BROADCAST_BYTES
from shardwise.splitting.ownership import deal
from shardwise.strategy import Strategy

FIRST_BUCKET_BYTES = 2**20
"""Bytes of DDP's first bucket (Li et al. 2020; torch/csrc/distributed/c10d/reducer.hpp: kDefaultFirstBucketBytes)."""

REPORT_BYTES = 24
"""Bytes that all ranks all-reduce after a step: loss, squared norm, flag of unused parameters: three float64.

See `parallel.program`.
"""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are all-reduced together, as soon as the backward pass is through segment `ready`."""

    bytes: int
    ready: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """Parameters that `fully_shard` gathers together.

    Attributes:
        gather: bytes of the gathered parameters, with padding.
        reduce: bytes of their gradients before the reduce-scatter, with padding; 0 if none is trained.
        parameters: bytes of the parameters, without padding.
    """

    gather: int
    reduce: int
    parameters: int


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


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage.

    Attributes:
        number: stage index; the stage lies on the worker with pipeline rank `number % pp`.
        first, end: its range of segments.
        blocks: its blocks, in order; empty if it is neither recomputed nor sharded block by block.
        root: parameters that `fully_shard` gathers for the whole stage.
        buckets: gradient buckets, in the order in which they become complete.
        sent: (stage that receives them, bytes of each message) of the activations sent for a microbatch.
        returned: (stage that receives them, bytes of each message) of the gradients sent back for a microbatch.
        received: bytes of the activations that arrive for a microbatch.
        kept: bytes saved of a microbatch between its forward and its backward pass, without recomputation.
        handed: (segment, bytes) of the values that recomputation saves of a microbatch: those that arrive at the stage,
            and those that enter and leave recomputed blocks. They are freed after the backward pass of that segment.
            Empty if no block is recomputed.
    """

    number: int
    first: int
    end: int
    blocks: tuple[Block, ...]
    root: Gathered | None
    buckets: tuple[Bucket, ...]
    sent: tuple[tuple[int, tuple[int, ...]], ...]
    returned: tuple[tuple[int, tuple[int, ...]], ...]
    received: int
    kept: int
    handed: tuple[tuple[int, int], ...]

    @property
    def recomputed(self) -> tuple[Block, ...]:
        """Return the blocks whose activations are recomputed."""
        return tuple(block for block in self.blocks if block.recomputed)


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of the pipeline; without a pipeline there is only one.

    Attributes:
        place: its pipeline rank.
        stages: its stages, in ascending order.
        twice: gradient buckets of parameters that several of its stages use.
        summed: bytes of each message that is all-reduced over tp after the last backward pass.
        tied: (pipeline ranks, bytes) of the gradients of parameters that these pipeline workers share. They are
            all-reduced over these workers.
        parameters: bytes of parameters and buffers that this worker holds: its shard, where they are sharded.
        trained: bytes of the gradients of these parameters.
        updated: (elements, tensors) that its optimizer updates, for the replica that updates most.
        broadcast: bytes of the messages in which replicas send each other updated parameters (zero=1).
        sliced: (bytes of parameters, bytes of gradients, elements updated) of the shards that `fully_shard` leaves on
            this worker; included in `parameters`, `trained` and `updated`.
    """

    place: int
    stages: tuple[Stage, ...]
    twice: tuple[Bucket, ...]
    summed: tuple[int, ...]
    tied: tuple[tuple[tuple[int, ...], int], ...]
    parameters: int
    trained: int
    updated: tuple[int, int]
    broadcast: tuple[int, ...]
    sliced: tuple[int, int, int]


@dataclass(frozen=True, slots=True)
class Parts:
    """All workers of one pipeline, which is the same in every replica."""

    strategy: Strategy
    workers: tuple[Worker, ...]
    cuts: tuple[tuple[int, ...], ...]
    """Segments at which the blocks of each stage begin."""

    @property
    def stages(self) -> dict[int, Stage]:
        """Return the stages of all workers by stage index."""
        return {stage.number: stage for worker in self.workers for stage in worker.stages}


def group_of(strategy: Strategy, axis: str, place: int = 0) -> Group:
    """Return the group of an axis that contains pipeline rank `place` of the first replica.

    Axis `replicas` is dp and fsdp together, `world` all ranks.
    """
    first = place * strategy.stride("pp")
    if axis == "world":
        return Group(strategy.workers)
    if axis == "tp":
        return Group(strategy.tp, 1, first)
    if axis == "pp":
        return Group(strategy.pp, strategy.stride("pp"))
    if axis == "dp":
        return Group(strategy.dp, strategy.stride("dp"), first)
    return Group(strategy.fsdp if axis == "fsdp" else strategy.replicas, strategy.stride("fsdp"), first)


def message_group(strategy: Strategy, source: int, target: int) -> Group:
    """Return the group of the two ranks that exchange a message, from pipeline ranks `source` and `target`."""
    low, high = sorted((source, target))
    return Group(2, (high - low) * strategy.stride("pp"), strategy.rank(pp=low))


def replica_axis(strategy: Strategy) -> str:
    """Return the name of the mesh axis over which replicas communicate: `dp` if there are several, else `fsdp`."""
    return "dp" if strategy.dp > 1 else "fsdp"


def parts_of(profile: Profile, strategy: Strategy, costs: Sequence[float], slower: tuple[float, ...] = ()) -> Parts:
    """Divide a profile over the workers of a strategy.

    Args:
        profile: the profile for the strategy's tp, sp, microbatch and precision.
        strategy: the strategy, with its number of microbatches settled.
        costs: seconds of the forward pass of each segment, by which stages are balanced. Pass the same object for the
            same costs: the result is cached by its `id()`.
        slower: for neighbouring pipeline ranks, how many times slower than assumed their messages are; see
            `balance.divided`.

    Raises:
        StrategyError: there are more stages than segments, or fsdp cannot shard a tied parameter.
    """
    if strategy.pp > 1:
        check_stages(strategy, len(profile.links) - 1)
    key = ("parts", id(costs), _traits(strategy), slower)

    def divide() -> tuple[tuple[Worker, ...], tuple[tuple[int, ...], ...]]:
        cuts = cuts_of(profile, strategy, costs, slower)
        return tuple(_workers(profile, strategy, cuts, module=strategy.tp == strategy.pp == 1)), cuts

    return Parts(strategy, *profile.kept.once(key, divide, costs))


def _traits(strategy: Strategy) -> tuple[object, ...]:
    """Return the cache key of a strategy: the options that decide which worker holds what."""
    dealt = strategy.replicas if strategy.zero == 1 else strategy.replicas > 1
    sharded = strategy.fsdp if strategy.splits_parameters else 0
    return (
        strategy.pp,
        strategy.stages_per_worker,
        strategy.zero,
        sharded,
        dealt,
        cuts_blocks(strategy),
        strategy.recompute,
        strategy.speeds,
        strategy.bucket,
    )


def cuts_of(
    profile: Profile, strategy: Strategy, costs: Sequence[float], slower: tuple[float, ...] = ()
) -> tuple[tuple[int, ...], ...]:
    """Return the segments at which the blocks of each stage begin; `costs` and `slower` as in `parts_of`."""
    if strategy.tp == strategy.pp == 1:
        return (tuple(_module_cuts(profile, strategy)),)
    key = "cuts", id(costs), strategy.pp, strategy.stages_per_worker, cuts_blocks(strategy), strategy.speeds, slower
    return profile.kept.once(key, lambda: tuple(map(tuple, _graph_cuts(profile, strategy, costs, slower))), costs)


def _graph_cuts(
    profile: Profile, strategy: Strategy, costs: Sequence[float], slower: tuple[float, ...]
) -> list[list[int]]:
    """Cut stages and their blocks as `balance.divided` does; the cached stages do not depend on the blocks."""
    stages, messages = strategy.pp * strategy.stages_per_worker, [link.message for link in profile.links[1:]]
    key = "stages", id(costs), stages, strategy.speeds, slower
    starts = profile.kept.once(
        key, lambda: stage_starts(costs, messages, stages, profile.device, strategy.stage_speeds, slower), costs
    )
    return blocks_from(costs, messages, starts, in_blocks=cuts_blocks(strategy))


def _module_cuts(profile: Profile, strategy: Strategy) -> list[int]:
    """Return the segments at which the module's repeated blocks, and the parts between them, begin."""
    if not cuts_blocks(strategy):
        return [0]
    bounds = {0}
    for first, end in module_blocks(profile):
        bounds |= {first, end}
    return sorted(bounds - {len(profile.links)})


def stage_blocks(profile: Profile, strategy: Strategy, starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Return the segment range (first, end) of each block of a stage, in the order in which recomputation takes them.

    Args:
        profile: the workload's profile.
        strategy: the strategy; its number of microbatches does not matter.
        starts: segments at which the stage's blocks begin, see `cuts_of`.
        end: end of the stage's segments.
    """
    return module_blocks(profile) if strategy.tp == strategy.pp == 1 else list(pairwise([*starts, end]))


def recomputed_links(profile: Profile, strategy: Strategy, starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Return the ranges of `stage_blocks` that are recomputed.

    A module that could not be traced has a single segment, which contains all blocks: it is recomputed once.
    """
    blocks = stage_blocks(profile, strategy, starts, end)
    count = strategy.recomputed_of(len(blocks))
    return blocks[: count if profile.cut else min(count, 1)]


def _workers(profile: Profile, strategy: Strategy, cuts: Sequence[Sequence[int]], *, module: bool) -> Iterable[Worker]:
    bounds = [*(starts[0] for starts in cuts), len(profile.links)]
    ranges = list(pairwise(bounds))
    stage_of = [stage for stage, (a, b) in enumerate(ranges) for _ in range(a, b)]
    homes = {index: {stage_of[link] for link in profile.parameters[index].links} for index in profile.shared}
    for place in range(strategy.pp):
        own = range(place, len(cuts), strategy.pp)
        twice = {index for index, stages in homes.items() if len(stages.intersection(own)) > 1}
        if twice and strategy.splits_parameters:
            name = profile.parameters[min(twice)].name
            raise StrategyError(
                f"{name} is used in several stages of one worker: fsdp cannot shard it twice: use zero=1, or "
                "schedule=1f1b"
            )
        stages = tuple(_stage(profile, strategy, stage, cuts, bounds, stage_of, twice, module=module) for stage in own)
        tied = {
            index: tuple(sorted({stage % strategy.pp for stage in found}))
            for index, found in homes.items()
            if found.intersection(own) and profile.parameters[index].trained
        }
        yield _worker(profile, strategy, place, stages, tuple(ranges[stage] for stage in own), twice, tied)


def _worker(
    profile: Profile,
    strategy: Strategy,
    place: int,
    stages: tuple[Stage, ...],
    ranges: tuple[tuple[int, int], ...],
    twice: set[int],
    homes: Mapping[int, tuple[int, ...]],
) -> Worker:
    kinds = profile.kinds_within(ranges)
    trained = [(parameter, count) for parameter, count in kinds if parameter.trained]
    tied: dict[tuple[int, ...], list[tuple[Parameter, int]]] = {}
    for index, workers in homes.items():
        if len(workers) > 1:
            tied.setdefault(workers, []).append((profile.parameters[index], 1))
    replicated = strategy.replicas > 1 and not strategy.splits_parameters
    several = [profile.parameters[index] for index in sorted(twice) if profile.parameters[index].trained]
    return Worker(
        place,
        stages,
        tuple(_reducer_buckets(several, stages[0].first, bucket_bytes(strategy.bucket)))
        if replicated and several
        else (),
        _flat([(parameter, count) for parameter, count in trained if parameter.summed], strategy),
        tuple((workers, size) for workers, shared in tied.items() for size in _flat(shared, strategy)),
        sum(count * _share(parameter, strategy) for parameter, count in kinds),
        sum(count * _share(parameter, strategy) for parameter, count in trained),
        *_updated(profile, ranges, trained, strategy),
        _sliced(kinds, strategy),
    )


def _sliced(kinds: Sequence[tuple[Parameter, int]], strategy: Strategy) -> tuple[int, int, int]:
    """Return the shards of (parameter, count) pairs that `fully_shard` leaves on this worker; see `Worker.sliced`."""
    split = [(each, count) for each, count in kinds if _is_split(each, strategy)]
    sizes = [(each, count * _share(each, strategy)) for each, count in split]
    trained = [(each, size) for each, size in sizes if each.trained]
    return (
        sum(size for _, size in sizes),
        sum(size for _, size in trained),
        sum(size // each.itemsize for each, size in trained),
    )


def _flat(parameters: Sequence[tuple[Parameter, int]], strategy: Strategy) -> tuple[int, ...]:
    """Return the bytes of the messages that sum gradients of (parameter, count) pairs: one message per element size."""
    sizes: dict[int, int] = {}
    for parameter, count in parameters:
        sizes[parameter.itemsize] = sizes.get(parameter.itemsize, 0) + count * _share(parameter, strategy)
    return tuple(sizes.values())


def _is_split(parameter: Parameter, strategy: Strategy) -> bool:
    """Return whether `fully_shard` shards a parameter: not a buffer, nor a scalar, which has no rows to split."""
    return strategy.splits_parameters and not parameter.buffer and bool(parameter.shape)


def _share(parameter: Parameter, strategy: Strategy) -> int:
    """Return the bytes of a parameter that the first fsdp rank holds: its shard, or all of an unsharded parameter."""
    if not _is_split(parameter, strategy):
        return parameter.bytes
    rows = min(parameter.shape[0], ceil(parameter.shape[0] / strategy.fsdp))
    return rows * (parameter.bytes // parameter.shape[0]) if parameter.shape[0] else 0


def _updated(
    profile: Profile,
    ranges: tuple[tuple[int, int], ...],
    kinds: Sequence[tuple[Parameter, int]],
    strategy: Strategy,
) -> tuple[tuple[int, int], tuple[int, ...]]:
    """Return (elements, tensors) of the replica that updates most, and the bytes of the broadcasts that follow.

    Only under zero=1 does each replica update its own parameters and broadcast them.
    """
    if strategy.zero != 1 or strategy.replicas == 1:
        elements = sum(count * (_share(parameter, strategy) // parameter.itemsize) for parameter, count in kinds)
        return (elements, sum(count for _, count in kinds)), ()
    indices = sorted({index for first, end in ranges for index in profile.within(first, end)})
    trained = [profile.parameters[index] for index in indices if profile.parameters[index].trained]
    owners = deal({parameter.name: parameter.elements for parameter in trained}, strategy.replicas)
    by_owner: list[list[Parameter]] = [[] for _ in range(strategy.replicas)]
    for parameter in trained:
        by_owner[owners[parameter.name]].append(parameter)
    most = max(by_owner, key=lambda owned: sum(parameter.elements for parameter in owned))
    sizes = tuple(size for owned in by_owner for size in _coalesced(owned, [BROADCAST_BYTES]))
    return (sum(parameter.elements for parameter in most), len(most)), sizes


def _coalesced(parameters: Iterable[Parameter], limits: Sequence[int]) -> list[int]:
    """Return the bytes of torch's buckets, which close once they reach the limit and hold one element size each."""
    return [size for size, _ in _assigned(parameters, limits)]


def _assigned(parameters: Iterable[Parameter], limits: Sequence[int]) -> list[tuple[int, int]]:
    """Return (bytes, smallest first segment) of torch's buckets (c10d: compute_bucket_assignment_by_size).

    `limits` are the bytes at which successive buckets close; the last one holds for all further buckets.
    """
    done: list[tuple[int, int]] = []
    filling: dict[int, tuple[int, int]] = {}
    used: dict[int, int] = {}
    for parameter in parameters:
        kind = parameter.itemsize
        size, link = filling.get(kind, (0, parameter.links[0]))
        size, link = size + parameter.bytes, min(link, parameter.links[0])
        filling[kind] = size, link
        number = used.get(kind, 0)
        if size >= limits[min(number, len(limits) - 1)]:
            done.append(filling.pop(kind))
            used[kind] = number + 1
    return done + list(filling.values())


def _reducer_buckets(parameters: Sequence[Parameter], first: int, limit: int) -> list[Bucket]:
    """Return the buckets of `gradient_reducer.GradientReducer`.

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
        Bucket(sum(p.bytes for p in bucket), min(next((k for k in p.links if k >= first), first) for p in bucket))
        for bucket in buckets
    ]


# ---- one stage ------------------------------------------------------------------------------------------------------


def _stage(
    profile: Profile,
    strategy: Strategy,
    number: int,
    cuts: Sequence[Sequence[int]],
    bounds: Sequence[int],
    stage_of: Sequence[int],
    twice: set[int],
    *,
    module: bool,
) -> Stage:
    first, end = bounds[number], bounds[number + 1]
    own = profile.within(first, end)
    ranges = tuple(pairwise([*cuts[number], end]))
    blocks: tuple[Block, ...] = ()
    root = None
    if cuts_blocks(strategy):
        blocks, root = (_module_parts if module else _graph_parts)(profile, strategy, ranges, own)
    again = [block for block in blocks if block.recomputed]
    key = ("handed", id(cuts), number)
    sent, returned, received, kept = profile.kept.once(key, lambda: _handed(profile, number, bounds, stage_of), cuts)
    return Stage(
        number,
        first,
        end,
        blocks,
        root,
        tuple(_buckets(profile, strategy, own, twice, first, module=module)),
        sent,
        returned,
        received,
        kept,
        ((first, received), *_between(profile, again, first, end)) if again else (),
    )


def _buckets(
    profile: Profile, strategy: Strategy, own: Sequence[int], twice: set[int], first: int, *, module: bool
) -> list[Bucket]:
    if strategy.replicas == 1:
        return []
    parameters, limit = profile.parameters, bucket_bytes(strategy.bucket)
    if strategy.splits_parameters:
        whole = [parameters[i] for i in own if parameters[i].trained and not parameters[i].shape and i not in twice]
        if module:
            return [Bucket(sum(parameter.bytes for parameter in whole), 0)] if whole else []
        return _reducer_buckets(whole, first, limit) if whole else []
    if module:
        ready = [parameters[index] for index in profile.ready]
        limits = [limit] if strategy.bucket else [FIRST_BUCKET_BYTES, limit]
        return [Bucket(size, link) for size, link in _assigned(ready, limits)]
    return _reducer_buckets([parameters[i] for i in own if parameters[i].trained and i not in twice], first, limit)


def _module_parts(
    profile: Profile, strategy: Strategy, ranges: tuple[tuple[int, int], ...], own: Sequence[int]
) -> tuple[tuple[Block, ...], Gathered | None]:
    """Return (blocks, root) of a module that runs as it is.

    The blocks are the module's repeated blocks. All between them belongs to the root and is not recomputed.
    """
    inside = {index for block in profile.blocks for index in block}
    sharded = strategy.splits_parameters
    again = len(recomputed_links(profile, strategy, (), 0))
    blocks = []
    for number, (block, (first, end)) in enumerate(zip(profile.blocks, module_blocks(profile), strict=True)):
        gathered = _gathered(profile, block, strategy) if sharded else None
        blocks.append(Block(first, end, gathered, number < again))
    root = _gathered(profile, [index for index in own if index not in inside], strategy) if sharded else None
    return tuple(sorted(blocks, key=lambda block: block.first)), root


def _graph_parts(
    profile: Profile, strategy: Strategy, ranges: tuple[tuple[int, int], ...], own: Sequence[int]
) -> tuple[tuple[Block, ...], Gathered | None]:
    """Return (blocks, root) of a stage of a traced graph.

    The blocks are consecutive ranges of segments. Parameters that several of them use belong to the root.
    """
    sharded, again = strategy.splits_parameters, strategy.recomputed_of(len(ranges))
    groups: Sequence[Gathered | None] = [None] * (len(ranges) + 1)
    if sharded:
        key = ("gathered", ranges, strategy.fsdp)
        groups = profile.kept.once(key, lambda: _gathered_apart(profile, strategy, ranges, own))
    blocks = (
        Block(a, b, group, number < again)
        for number, ((a, b), group) in enumerate(zip(ranges, groups[:-1], strict=True))
    )
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
    for index in indices:
        parameter = profile.parameters[index]
        if parameter.buffer or not parameter.shape or not parameter.shape[0]:
            continue
        rows = parameter.bytes // parameter.shape[0]
        padded = strategy.fsdp * ceil(parameter.shape[0] / strategy.fsdp) * rows
        gather += padded
        reduce += padded if parameter.trained else 0
        size += parameter.bytes
    return Gathered(gather, reduce, size) if size else None


Messages = tuple[tuple[int, tuple[int, ...]], ...]


def _handed(
    profile: Profile, number: int, bounds: Sequence[int], stage_of: Sequence[int]
) -> tuple[Messages, Messages, int, int]:
    """Return (sent, returned, received, kept) of a stage for one microbatch; see the attributes of `Stage`."""
    first, end = bounds[number], bounds[number + 1]
    sent: dict[int, list[int]] = {}
    returned: dict[int, list[int]] = {}
    received = 0
    kept = profile.saved[end] - profile.saved[first]
    for value in profile.crossing(first, end):
        if first <= value.made < end:
            targets = sorted({stage_of[link] for link in value.used if link >= end})
            for target in targets:
                sent.setdefault(target, []).append(value.message)
            if not any(first <= link < end for link in value.saved[:1]):
                kept += value.held  # an output is held until its gradient arrives
        elif value.made >= 0:
            received += value.message
            kept += value.message if not first <= (value.saved or (-1,))[0] < end else 0
            if value.grad:
                returned.setdefault(stage_of[value.made], []).append(value.message)
        elif any(first <= link < end for link in value.saved):
            kept += value.held if not first <= value.saved[0] < end else 0
    flat = [tuple((stage, tuple(sizes)) for stage, sizes in sorted(found.items())) for found in (sent, returned)]
    return flat[0], flat[1], received, kept


def _between(profile: Profile, again: Sequence[Block], first: int, end: int) -> list[tuple[int, int]]:
    """Return (segment, bytes) of the stage's own values that stay although its recomputed blocks `again` save nothing.

    A value stays until the backward pass of that segment. It is either an input of a recomputed block from another part
    of the stage, or a value that a recomputed block saves first and a part that is not recomputed saves too. Values
    that a part that is not recomputed saves first are counted there.
    """
    block_of = {link: block for block in again for link in range(block.first, block.end)}
    bounds = {bound for block in again for bound in (block.first, block.end) if first < bound < end}
    passing = {id(value): value for bound in bounds for value in profile.live[bound] if value.made >= first}
    sizes: dict[int, int] = {}
    for value in passing.values():
        until = _needed_until(value, block_of, end)
        if until is not None:
            sizes[until] = sizes.get(until, 0) + value.held
    return sorted(sizes.items())


def _needed_until(value: Value, block_of: Mapping[int, Block], end: int) -> int | None:
    """Return the segment whose backward pass is the last to need a value.

    Returns None if the value is not held beside what parts save: a part that is not recomputed saves it first, or no
    such part saves it and no recomputed block uses it other than the one that made it.
    """
    saved = [link for link in value.saved if link < end]
    if saved and saved[0] not in block_of:
        return None
    made = block_of.get(value.made)
    entered = [block for link in value.used if link < end and (block := block_of.get(link, made)) is not made]
    found = [block.first for block in entered if block is not None] + [link for link in saved if link not in block_of]
    return min(found, default=None)
