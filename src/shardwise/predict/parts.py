"""What each worker holds of a workload under a strategy, and when it tells the others: the program's shape in numbers.

Everything that `parallel` decides about messages is decided here in the same way, from a profile instead of a module:

    ModuleEngine   (tp = pp = 1)    one stage; DDP's buckets, or `fully_shard` on the module's repeated blocks
    GraphEngine    (tp or pp)       stages and blocks cut by cost; buckets of `reduce.GradientReducer`, or `fully_shard`
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from shardwise.collective import Group
from shardwise.errors import StrategyError
from shardwise.parallel.deal import BUCKET_BYTES as BROADCAST_BYTES
from shardwise.parallel.deal import deal
from shardwise.parallel.planning import blocks_from, check_stages, cuts_blocks, stage_starts
from shardwise.parallel.reduce import bucket_bytes
from shardwise.predict.profile import Parameter, Profile, Value
from shardwise.strategy import Strategy

FIRST_BUCKET_BYTES = 2**20
"""Of DDP's first bucket (Li et al. 2020; torch/csrc/distributed/c10d/reducer.hpp: kDefaultFirstBucketBytes)."""

REPORT_BYTES = 24
"""Loss, squared norm, and whether parameters were left unused: three float64, see `parallel.program`."""


@dataclass(frozen=True, slots=True)
class Bucket:
    """Gradients that are added up together: complete when the backward pass has done link `ready`."""

    bytes: int
    ready: int


@dataclass(frozen=True, slots=True)
class Gathered:
    """Parameters that `fully_shard` gathers together.

    Attributes:
        gather: bytes of the gathered parameters, padded.
        reduce: bytes of their gradients before they are scattered, padded; 0: none is trained.
        parameters: bytes of the parameters.
    """

    gather: int
    reduce: int
    parameters: int


@dataclass(frozen=True, slots=True)
class Block:
    """Consecutive links that are gathered, freed and recomputed together.

    Attributes:
        first, end: its links.
        gathered: its parameters; None without `fully_shard`.
        recomputed: whether its activations are dropped and computed again.
    """

    first: int
    end: int
    gathered: Gathered | None = None
    recomputed: bool = False


@dataclass(frozen=True, slots=True)
class Stage:
    """One pipeline stage.

    Attributes:
        number: of the stage; it lies on worker `number % pp`.
        first, end: its links.
        blocks: of it, in order; none where it is neither recomputed nor sharded in blocks.
        root: parameters that `fully_shard` gathers for all of the stage.
        buckets: of gradients, in the order in which they are complete.
        sent: messages of each microbatch by the stage that they go to, bytes each.
        returned: gradients of each microbatch by the stage that they go to.
        received: bytes of the values that arrive for a microbatch.
        kept: bytes that are kept of a microbatch between its passes, without recomputation.
        handed: (link, bytes) of what arrives and of what blocks hand to each other, where recomputation keeps nothing
            else of a microbatch: until the backward pass of that link; nothing where no block is computed again.
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
        """The blocks that are computed again."""
        return tuple(block for block in self.blocks if block.recomputed)


@dataclass(frozen=True, slots=True)
class Worker:
    """One worker of the pipeline (the only one without): what it holds besides its stages.

    Attributes:
        place: in the pipeline.
        stages: its own, ascending.
        twice: buckets of what several of its stages use.
        summed: bytes that are added up over tp after the last backward pass, one message each.
        tied: (pipeline workers, bytes) that share parameters: added up over them.
        parameters: bytes of parameters and buffers that stay here.
        trained: bytes of gradients of what stays here.
        updated: (elements, tensors) that its optimizer updates; of the replica that updates most.
        broadcast: messages with which replicas send each other updated parameters (zero=1).
        sliced: (bytes of parameters, bytes of gradients, elements that are updated) that `fully_shard` splits.
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
    """All workers of one pipeline, and the groups of the first of them."""

    strategy: Strategy
    workers: tuple[Worker, ...]
    cuts: tuple[tuple[int, ...], ...]
    """Links at which the blocks of each stage begin."""

    @property
    def stages(self) -> dict[int, Stage]:
        """All stages by number."""
        return {stage.number: stage for worker in self.workers for stage in worker.stages}


def group_of(strategy: Strategy, axis: str, place: int = 0) -> Group:
    """The ranks of an axis, with the first replica's pipeline worker `place` among them.

    `replicas` are dp and fsdp together, `world` all.
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
    """The two ranks between which a message goes, of pipeline workers `source` and `target`."""
    low, high = sorted((source, target))
    return Group(2, (high - low) * strategy.stride("pp"), strategy.rank(pp=low))


def replica_axis(strategy: Strategy) -> str:
    """What the axis of all replicas is called."""
    return "dp" if strategy.dp > 1 else "fsdp"


def parts_of(profile: Profile, strategy: Strategy, costs: Sequence[float], slower: tuple[float, ...] = ()) -> Parts:
    """Divides a profile over the workers of a strategy (its number of microbatches settled).

    Args:
        profile: for the strategy's tp, sp, microbatch and precision.
        strategy: how to divide.
        costs: seconds of the forward pass of each link, by which stages are balanced; the same object where they are
            the same, for what is found is kept.
        slower: how many times slower than assumed messages are between neighbours, see `planning.divided`.

    Raises:
        StrategyError: there are more stages than links; a tied parameter that fsdp cannot shard.
    """
    if strategy.pp > 1:
        check_stages(strategy, len(profile.links) - 1)
    key = ("parts", id(costs), _traits(strategy), slower)

    def divide() -> tuple[tuple[Worker, ...], tuple[tuple[int, ...], ...]]:
        cuts = cuts_of(profile, strategy, costs, slower)
        return tuple(_workers(profile, strategy, cuts, module=strategy.tp == strategy.pp == 1)), cuts

    return Parts(strategy, *profile.kept.once(key, divide, costs))


def _traits(strategy: Strategy) -> tuple[object, ...]:
    """What of a strategy decides who holds what."""
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
    """Links at which the blocks of each stage begin; `costs` and `slower` as in `parts_of`."""
    if strategy.tp == strategy.pp == 1:
        return (tuple(_module_cuts(profile, strategy)),)
    key = "cuts", id(costs), strategy.pp, strategy.stages_per_worker, cuts_blocks(strategy), strategy.speeds, slower
    return profile.kept.once(key, lambda: tuple(map(tuple, _graph_cuts(profile, strategy, costs, slower))), costs)


def _graph_cuts(
    profile: Profile, strategy: Strategy, costs: Sequence[float], slower: tuple[float, ...]
) -> list[list[int]]:
    """As `planning.divided` cuts; where the stages begin is kept, with and without blocks."""
    stages, messages = strategy.pp * strategy.stages_per_worker, [link.message for link in profile.links[1:]]
    key = "stages", id(costs), stages, strategy.speeds, slower
    starts = profile.kept.once(
        key, lambda: stage_starts(costs, messages, stages, profile.device, strategy.stage_speeds, slower), costs
    )
    return blocks_from(costs, messages, starts, in_blocks=cuts_blocks(strategy))


def _module_cuts(profile: Profile, strategy: Strategy) -> list[int]:
    """Where the links of the module's blocks begin, and the parts between them."""
    if not cuts_blocks(strategy):
        return [0]
    bounds = {0}
    for first, end in module_blocks(profile):
        bounds |= {first, end}
    return sorted(bounds - {len(profile.links)})


def module_blocks(profile: Profile) -> list[tuple[int, int]]:
    """Links (first, end) of the module's repeated blocks, in the order of the module."""
    found = []
    for block in profile.blocks:
        links = [link for index in block for link in profile.parameters[index].links]
        found.append((min(links), max(links) + 1))
    return found


def stage_blocks(profile: Profile, strategy: Strategy, starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Links (first, end) of the blocks of a stage, in the order in which they are computed again.

    Args:
        profile: of the workload.
        strategy: its number of microbatches does not matter.
        starts: links at which the stage's blocks begin, see `cuts_of`.
        end: of the stage.
    """
    return module_blocks(profile) if strategy.tp == strategy.pp == 1 else list(pairwise([*starts, end]))


def recomputed_links(profile: Profile, strategy: Strategy, starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Those of `stage_blocks` that are computed again.

    Where the module could not be traced its blocks all lie on the one link there is, which is computed again once.
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
    """See `Worker.sliced`."""
    split = [(each, count) for each, count in kinds if _is_split(each, strategy)]
    sizes = [(each, count * _share(each, strategy)) for each, count in split]
    trained = [(each, size) for each, size in sizes if each.trained]
    return (
        sum(size for _, size in sizes),
        sum(size for _, size in trained),
        sum(size // each.itemsize for each, size in trained),
    )


def _flat(parameters: Sequence[tuple[Parameter, int]], strategy: Strategy) -> tuple[int, ...]:
    """Bytes of the messages in which gradients of (parameter, how many) are added up: one for each size of elements."""
    sizes: dict[int, int] = {}
    for parameter, count in parameters:
        sizes[parameter.itemsize] = sizes.get(parameter.itemsize, 0) + count * _share(parameter, strategy)
    return tuple(sizes.values())


def _is_split(parameter: Parameter, strategy: Strategy) -> bool:
    """Whether `fully_shard` splits a parameter."""
    return strategy.splits_parameters and not parameter.buffer and bool(parameter.shape)


def _share(parameter: Parameter, strategy: Strategy) -> int:
    """Bytes of a parameter that the first worker keeps."""
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
    """(elements, tensors) of the replica that updates most, and what replicas send each other then."""
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
    """Bytes of the buckets that torch makes: closed as soon as they reach the limit, one kind of element each."""
    return [size for size, _ in _assigned(parameters, limits)]


def _assigned(parameters: Iterable[Parameter], limits: Sequence[int]) -> list[tuple[int, int]]:
    """(bytes, smallest first link) of torch's buckets (c10d: compute_bucket_assignment_by_size)."""
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
    """The buckets of `reduce.GradientReducer`; a parameter's gradient is complete at its first link from `first` on."""
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
    """The module's repeated blocks; what is between them is neither recomputed nor gathered apart."""
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
    """Consecutive ranges of links; what several of them use is gathered for the whole stage."""
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
    """What is gathered for each range of links, and last what several of them use."""
    several = Counter(index for a, b in ranges for index in profile.within(a, b))
    alone = [[index for index in profile.within(a, b) if several[index] == 1] for a, b in ranges]
    shared = [index for index in own if several[index] > 1]
    return tuple(_gathered(profile, indices, strategy) for indices in [*alone, shared])


def _gathered(profile: Profile, indices: Iterable[int], strategy: Strategy) -> Gathered | None:
    """A group of `fully_shard`: rows are padded so that all workers have as many."""
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
    """Messages to other stages, gradients to other stages, bytes that arrive, bytes that are kept of a microbatch."""
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
                kept += value.held  # an output is kept until its gradient comes
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
    """(link, bytes) of a stage's own values that are kept although what these blocks save is dropped.

    They are kept until the backward pass of that link: what one of these blocks gets from another part of the stage,
    and what others save of what one of them saved first. What is saved first by a part that is not computed again
    counts there.
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
    """The link whose backward pass is the last to need a value; None: it is not kept for others than who made it."""
    saved = [link for link in value.saved if link < end]
    if saved and saved[0] not in block_of:
        return None
    made = block_of.get(value.made)
    entered = [block for link in value.used if link < end and (block := block_of.get(link, made)) is not made]
    found = [block.first for block in entered if block is not None] + [link for link in saved if link not in block_of]
    return min(found, default=None)
