"""Division of a workload over the workers of a strategy: stages, blocks, buckets and shards, with their bytes.

It repeats the decisions of `parallel` about cuts and communication, from a profile instead of a module:

    ModuleEngine   (tp = pp = 1)    one stage; DDP's buckets, or `fully_shard` on the module's repeated blocks
    GraphEngine    (tp or pp)       stages and blocks cut by cost; buckets of `GradientReducer`, or `fully_shard`

Segments are known by their index in `Profile.segments`; a range from `first` to `end` excludes `end`.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from shardwise.errors import StrategyError
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Parameter, Profile
from shardwise.predict.workers.activations import boundary_values, saved_between_blocks
from shardwise.predict.workers.buckets import (
    Block,
    Bucket,
    Gathered,
    coalesced,
    graph_parts,
    module_parts,
    reducer_buckets,
    stage_buckets,
)
from shardwise.predict.workers.cuts import cuts_of
from shardwise.splitting.balance import cuts_blocks
from shardwise.splitting.buckets import bucket_bytes
from shardwise.splitting.local_steps import cut_fragments
from shardwise.splitting.ownership import BUCKET_BYTES as BROADCAST_BYTES
from shardwise.splitting.ownership import assign_owners
from shardwise.splitting.servers import server_of
from shardwise.strategy import Strategy

REPORT_BYTES = 24
"""Bytes that all ranks all-reduce after a step: loss, squared norm, flag of unused parameters: three float64.

See `parallel.program`.
"""


def report_bytes(profile: Profile) -> int:
    """Return the bytes that all ranks all-reduce after a step: `REPORT_BYTES`, and each of several losses."""
    return REPORT_BYTES + 8 * (profile.losses if profile.losses > 1 else 0)


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
        saved: bytes saved of a microbatch between its forward and its backward pass, without recomputation.
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
    saved: int
    handed: tuple[tuple[int, int], ...]

    @property
    def recomputed(self) -> tuple[Block, ...]:
        """Return the blocks whose activations are recomputed."""
        return tuple(block for block in self.blocks if block.recomputed)

    def block_at(self, segment: int) -> tuple[int, bool]:
        """Return (index of a segment's block, True), or (index of the next block in the backward pass, False).

        The second form is for a segment outside of all blocks; its index is -1 if no block follows in the backward
        pass.
        """
        index = bisect_right(self.blocks, segment, key=lambda block: block.first) - 1
        return index, index >= 0 and segment < self.blocks[index].end


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of the pipeline; without a pipeline there is only one.

    Attributes:
        pipeline_rank: its pipeline rank.
        stages: its stages, in ascending order.
        twice: gradient buckets of parameters that several of its stages use.
        summed: bytes of each message that is all-reduced over tp after the last backward pass.
        tied: (pipeline ranks, bytes) of the gradients of parameters that these pipeline workers share. They are
            all-reduced over these workers.
        parameters: bytes of parameters and buffers that this worker holds: its shard, where they are sharded.
        kept: bytes of those that stay in float32 where others are copied in half precision.
        trained: bytes of the gradients of these parameters.
        updated: (elements, tensors) that its optimizer updates, for the replica that updates most.
        broadcast: bytes of the messages in which replicas send each other updated parameters (zero=1).
        served: (elements, tensors, bytes) of the parameters that each parameter server updates.
        sliced: (bytes of parameters, bytes of gradients, elements updated) of the shards that `fully_shard` leaves on
            this worker; included in `parameters`, `trained` and `updated`.
        averaged: bytes of the messages that average each fragment of the parameters after local steps, by fragment.
    """

    pipeline_rank: int
    stages: tuple[Stage, ...]
    twice: tuple[Bucket, ...]
    summed: tuple[int, ...]
    tied: tuple[tuple[tuple[int, ...], int], ...]
    parameters: int
    kept: int
    trained: int
    updated: tuple[int, int]
    broadcast: tuple[int, ...]
    served: tuple[tuple[int, int, int], ...]
    sliced: tuple[int, int, int]
    averaged: tuple[tuple[int, ...], ...] = ()


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


def parts_of(profile: Profile, strategy: Strategy, costs: tuple[float, ...], slower: tuple[float, ...] = ()) -> Parts:
    """Divide a profile over the workers of a strategy.

    Args:
        profile: the profile for the strategy's tp, sp, microbatch and precision.
        strategy: the strategy, with its number of microbatches settled.
        costs: seconds of the forward pass of each segment, by which stages are balanced.
        slower: for neighbouring pipeline ranks, how many times slower than assumed their messages are; see
            `balance.divided`.

    Raises:
        StrategyError: there are more stages than segments, or fsdp cannot shard a tied parameter.
    """
    key = ("parts", costs, _traits(strategy), slower)

    def divide() -> tuple[tuple[Worker, ...], tuple[tuple[int, ...], ...]]:
        cuts = cuts_of(profile, strategy, costs, slower)
        return tuple(_workers(profile, strategy, cuts, module=strategy.runs_module)), cuts

    return Parts(strategy, *profile.memo.once(key, divide))


def _traits(strategy: Strategy) -> tuple[object, ...]:
    """Return the cache key of a strategy: the options that decide which worker holds what."""
    dealt = strategy.summing if strategy.zero == 1 else strategy.summing > 1
    sharded = strategy.fsdp if strategy.splits_parameters else 0
    return (
        strategy.pp,
        strategy.stages_per_worker,
        strategy.zero,
        sharded,
        dealt,
        cuts_blocks(strategy),
        strategy.recompute,
        strategy.recomputes and strategy.schedule == "gpipe",  # see `balance.recomputable`
        strategy.speeds,
        strategy.bucket,
        bool(strategy.compress),  # the shapes in buckets
        strategy.fragments if strategy.local else 0,
        strategy.ps,
    )


def _workers(profile: Profile, strategy: Strategy, cuts: Sequence[Sequence[int]], *, module: bool) -> Iterable[Worker]:
    bounds = [*(starts[0] for starts in cuts), len(profile.segments)]
    ranges = list(pairwise(bounds))
    stage_of = [stage for stage, (a, b) in enumerate(ranges) for _ in range(a, b)]
    homes = {index: {stage_of[segment] for segment in profile.parameters[index].segments} for index in profile.shared}
    for pipeline_rank in range(strategy.pp):
        own = range(pipeline_rank, len(cuts), strategy.pp)
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
        yield _worker(profile, strategy, pipeline_rank, stages, tuple(ranges[stage] for stage in own), twice, tied)


def _worker(
    profile: Profile,
    strategy: Strategy,
    pipeline_rank: int,
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
    replicated = strategy.sums_in_buckets
    several = [profile.parameters[index] for index in sorted(twice) if profile.parameters[index].trained]
    return Worker(
        pipeline_rank,
        stages,
        tuple(reducer_buckets(several, stages[0].first, bucket_bytes(strategy.bucket), strategy))
        if replicated and several
        else (),
        _flat([(parameter, count) for parameter, count in trained if parameter.summed], strategy),
        tuple((workers, size) for workers, shared in tied.items() for size in _flat(shared, strategy)),
        sum(count * shard_bytes(parameter, strategy) for parameter, count in kinds),
        sum(count * shard_bytes(parameter, strategy) for parameter, count in kinds if parameter.kept),
        sum(count * shard_bytes(parameter, strategy) for parameter, count in trained),
        *_updated(profile, ranges, trained, strategy),
        _served(profile, strategy),
        _sliced(kinds, strategy),
        _averaged(profile, strategy, ranges),
    )


def _averaged(profile: Profile, strategy: Strategy, ranges: tuple[tuple[int, int], ...]) -> tuple[tuple[int, ...], ...]:
    """Return the bytes of the messages that average each fragment; see `Worker.averaged`.

    There is one message per size of an element. Buffers belong to the first fragment, except for counters: these are
    single whole numbers.
    """
    if not strategy.local:
        return ()
    trained = [parameter for parameter in profile.parameters if parameter.trained]
    whole = [parameter.bytes * (profile.tp if parameter.cut else 1) for parameter in trained]
    number_of = {
        trained[index].name: number
        for number, fragment in enumerate(cut_fragments(whole, strategy.fragments))
        for index in fragment
    }
    found: list[dict[int, int]] = [{} for _ in range(strategy.fragments)]
    for index in sorted({index for first, end in ranges for index in profile.within(first, end)}):
        parameter = profile.parameters[index]
        if parameter.trained or (parameter.buffer and parameter.shape):
            sizes = found[number_of.get(parameter.name, 0)]
            sizes[parameter.itemsize] = sizes.get(parameter.itemsize, 0) + shard_bytes(parameter, strategy)
    return tuple(tuple(sizes.values()) for sizes in found)


def _sliced(kinds: Sequence[tuple[Parameter, int]], strategy: Strategy) -> tuple[int, int, int]:
    """Return the shards of (parameter, count) pairs that `fully_shard` leaves on this worker; see `Worker.sliced`."""
    split = [(each, count) for each, count in kinds if is_split(each, strategy)]
    sizes = [(each, count * shard_bytes(each, strategy)) for each, count in split]
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
        sizes[parameter.itemsize] = sizes.get(parameter.itemsize, 0) + count * shard_bytes(parameter, strategy)
    return tuple(sizes.values())


def is_split(parameter: Parameter, strategy: Strategy) -> bool:
    """Return whether `fully_shard` shards a parameter: not a buffer, nor one that it leaves whole."""
    return strategy.splits_parameters and not parameter.buffer and not parameter.whole


def shard_bytes(parameter: Parameter, strategy: Strategy) -> int:
    """Return the bytes of a parameter that the first fsdp rank holds: its shard, or all of an unsharded parameter."""
    if not is_split(parameter, strategy):
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
    if strategy.ps:
        return (0, 0), ()
    if strategy.zero != 1 or strategy.summing == 1:
        elements = sum(count * (shard_bytes(parameter, strategy) // parameter.itemsize) for parameter, count in kinds)
        return (elements, sum(count for _, count in kinds)), ()
    if not profile.runtime.owners:
        elements = sum(count * parameter.elements for parameter, count in kinds)
        return (ceil(elements / strategy.summing), sum(count for _, count in kinds)), ()
    indices = sorted({index for first, end in ranges for index in profile.within(first, end)})
    trained = [profile.parameters[index] for index in indices if profile.parameters[index].trained]
    owners = assign_owners({parameter.name: parameter.elements for parameter in trained}, strategy.summing)
    by_owner: list[list[Parameter]] = [[] for _ in range(strategy.summing)]
    for parameter in trained:
        by_owner[owners[parameter.name]].append(parameter)
    most = max(by_owner, key=lambda owned: sum(parameter.elements for parameter in owned))
    sizes = tuple(size for owned in by_owner for size in coalesced(owned, [BROADCAST_BYTES]))
    return (sum(parameter.elements for parameter in most), len(most)), sizes


def _served(profile: Profile, strategy: Strategy) -> tuple[tuple[int, int, int], ...]:
    """Return what each parameter server updates; empty without servers. See `Worker.served`."""
    trained = [parameter for parameter in profile.parameters if parameter.trained] if strategy.ps else []
    owners = server_of({parameter.name: parameter.elements for parameter in trained}, strategy.ps)
    by_server: list[list[Parameter]] = [[] for _ in range(strategy.ps)]
    for parameter in trained:
        by_server[owners[parameter.name]].append(parameter)
    return tuple((sum(p.elements for p in own), len(own), sum(p.bytes for p in own)) for own in by_server)


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
        blocks, root = (module_parts if module else graph_parts)(profile, strategy, ranges, own)
    again = [block for block in blocks if block.recomputed]
    key = ("handed", Same(cuts), number)
    sent, returned, received, saved = profile.memo.once(key, lambda: boundary_values(profile, number, bounds, stage_of))
    return Stage(
        number,
        first,
        end,
        blocks,
        root,
        tuple(stage_buckets(profile, strategy, own, twice, first, module=module)),
        sent,
        returned,
        received,
        saved,
        ((first, received), *saved_between_blocks(profile, again, first, end)) if again else (),
    )
