"""Lower bounds of a strategy's step time, from sums over its profile alone, to skip strategies that cannot win.

Terms: T seconds of one microbatch through all stages, B of its backward pass, m microbatches, p pipeline workers:

    computing      each worker computes its part of every microbatch, and updates its part of the parameters;
                   a pipeline of one stage each also fills and drains once: T (1 + (m - 1) / p), else m T / p
    gradients      can be sent from the last backward pass on, which recomputes: m T / p - B / p + all-reduce
    gathers        `fully_shard` gathers and scatters on one channel: a step takes at least as long as these do; if they
                   block (on a CPU), their time is added
    messages       one microbatch goes through all workers and back
    stages         a tighter bound that takes longer to compute: the slowest worker of the pipeline as it would be cut,
                   which recomputes its blocks and adds each gradient to that of earlier microbatches; tighter still
                   where stages gather parameters, see `sharded_bounds`

The lower bounds of memory are in `memory_bounds`.

No strategy costs less than its bound (tests compare all strategies of small jobs with their bounds), so skipping
strategies whose bound exceeds a known cost never loses the best one.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.options import FULL
from shardwise.planner.search.memory_bounds import even, owners
from shardwise.predict.closed_form.pipeline import StageTime, alone
from shardwise.predict.closed_form.pipeline_links import slower_links
from shardwise.predict.closed_form.segment_times import SegmentTimes, Times, timed, times_of
from shardwise.predict.closed_form.stage_time import CommunicationTimes, trained_within
from shardwise.predict.closed_form.step_time import SHORT_TABLE
from shardwise.predict.hardware.times import collective_seconds
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.predict.runtime.element_bytes import reduced, scattered
from shardwise.predict.workers.cuts import cuts_of, recomputed_segments
from shardwise.predict.workers.groups import group_of
from shardwise.predict.workers.passes import turns
from shardwise.predict.workers.step_program import reduction
from shardwise.strategy import OUTERMOST, Strategy

INPUTS = 0.4
"""Least share of a backward pass that the gradients of the inputs take.

It is one half if the gradients of inputs and of weights are matmuls of the same size.
"""

MANY = 6
"""Fewest microbatches with which the most frequent backward pass of a stage certainly adds to earlier gradients."""


@dataclass(frozen=True, slots=True)
class CutStages:
    """Lower bounds of the passes of each stage, by stage index, without the communication of replicas.

    Attributes:
        passes: seconds of the passes of one microbatch, and of the messages before them.
        adds: seconds in which a backward pass adds its gradients to those of earlier microbatches.
        trained: bytes of the trained parameters that no other segment uses.
    """

    passes: list[StageTime]
    adds: list[float]
    trained: list[int]


def family_seconds(profile: ProfileSummary, strategy: Strategy, cluster: Cluster) -> float:
    """Bound the step time of a family from below, in seconds, by computation and pipeline messages alone.

    A family is all strategies that differ only in how replicas store parameters.
    """
    return max(_passes(profile, strategy, cluster))


def _passes(profile: ProfileSummary, strategy: Strategy, cluster: Cluster) -> tuple[float, float]:
    """Return lower bounds in seconds: from the pipeline's first pass to its last, and of the mean worker's compute."""
    times = times_of(profile, cluster, strategy)
    one = times.forward + times.backward + times.weights
    share = _recomputed(profile, strategy)
    if strategy.saves_products:
        one += times.repeated_rest * share
    elif strategy.recompute == FULL:  # if only a part of the blocks is recomputed, the time is not known here
        one += times.repeated * share
    filled = _filled(profile, strategy, times.forward, one) + _trip(profile, strategy, cluster)
    return filled, one * strategy.microbatches / strategy.pp


def _recomputed(profile: ProfileSummary, strategy: Strategy) -> float:
    """Return the least share of the repeated blocks that is recomputed: a graph's last block has at most two."""
    if strategy.runs_module:
        return 1.0
    return max(0.0, 1 - 2 / profile.blocks) if profile.blocks else 0.0


def _trip(profile: ProfileSummary, strategy: Strategy, cluster: Cluster) -> float:
    """Return the seconds of one microbatch's messages through all pipeline workers and back, each to a nearest rank."""
    if strategy.pp == 1 or not profile.message:
        return 0.0
    return 2 * (strategy.pp - 1) * _collective("send", profile.message, 2, strategy.tp, Same(cluster))


def staged_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Bound the step time of a family from below, in seconds, by the computation of the stages as they are cut.

    This takes longer than `family_seconds` and is tighter, because stages are not equal. Whatever the schedule, a
    worker computes all its stages for each microbatch; it starts after the stages before its first one, which also run
    after it on the way back. One microbatch goes through all stages, except for gradients of weights that are put off.
    Returns 0 if links between stages are slow: they then influence where stages are cut, and the strategies of a family
    send over different links.
    """
    words = OUTERMOST if strategy.pp > 1 and strategy.replicas > 1 else (strategy.outermost,)
    if any(slower_links(profile, strategy.with_(outermost=word), cluster) for word in words):
        return 0.0
    cut = cut_stages(profile, strategy, cluster)
    stages, count = cut.passes, strategy.microbatches
    adding = count - 2 if count >= MANY else 0  # all but the first pass, and the last one, which may do so in buckets
    later = strategy.schedule == "zero-bubble"  # gradients of weights, after the others have been sent back
    around, best = 0.0, 0.0 if later else alone(stages)
    for index, stage in enumerate(stages[: strategy.pp]):
        around += stage.arrives
        busy = sum(each.forward + each.backward for each in stages[index :: strategy.pp])
        best = max(best, around + count * busy + adding * sum(cut.adds[index :: strategy.pp]))
        around += stage.forward
        if not later:
            around += stage.backward + stage.returns
    return best


def cut_stages(profile: Profile, strategy: Strategy, cluster: Cluster) -> CutStages:
    """Return the stages of a family, cached."""
    times = timed(profile, cluster, strategy)
    key = (
        "bounds",
        "stages",
        Same(times),
        strategy.pp,
        strategy.stages_per_worker,
        strategy.recompute,
        strategy.schedule,
    )
    return profile.memo.once(key, lambda: _cut_in_stages(profile, strategy, cluster, times))


def _cut_in_stages(profile: Profile, strategy: Strategy, cluster: Cluster, times: SegmentTimes) -> CutStages:
    cuts = cuts_of(profile, strategy, times.forward.each)
    ends = [*(starts[0] for starts in cuts[1:]), len(profile.segments)]
    message = 0.0
    if strategy.pp > 1:
        least = min(segment.message for segment in profile.segments[1:])
        message = _collective("send", least, 2, strategy.tp, Same(cluster)) if least else 0.0
    calls = CommunicationTimes(profile, strategy, cluster, times)
    copied = 5 / 2 if profile.runtime.copies else 3.0  # bytes read and written, see `StageCosts`
    passes, adds, trained = [], [], []
    for starts, end in zip(cuts, ends, strict=True):
        first = starts[0]
        backward = times.backward.between(first, end).device + times.weights.between(first, end).device
        for block, after in recomputed_segments(profile, strategy, starts, end):
            backward += times.again(block, after, products=strategy.saves_products).device
        received = message if first else 0.0
        sends = message if end < len(profile.segments) else 0.0
        passes.append(StageTime(times.forward.between(first, end).device, backward, 0.0, received, sends))
        elements, size, count = trained_within(profile, first, end)
        adds.append(0.0 if profile.runtime.kernels else calls.moved(elements, copied * size, count).kernels)
        trained.append(size - trained_within(profile, first, end, shared=True)[1])
    return CutStages(passes, adds, trained)


def summed_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Bound the step time of a pipeline whose replicas all-reduce whole gradients from below, in seconds.

    The first worker is the last to end its passes. Its last backward passes hide its all-reduces no longer than they
    compute. With zero=1 its replicas then broadcast the parameters that each has updated. Returns 0 for any other
    strategy, and where a formula of `pipeline` does not give the time of these passes.
    """
    pipeline = strategy.pp > 1 and strategy.sums_in_buckets and strategy.schedule != "zero-bubble"
    if not pipeline or strategy.speeds or strategy.compress or cluster.collectives or strategy.microbatches < MANY:
        return 0.0
    if strategy.pp * strategy.stages_per_worker * strategy.microbatches <= SHORT_TABLE:
        return 0.0
    times, runtime = timed(profile, cluster, strategy), profile.runtime
    if times.device.kind == "cpu" or times.normalised or not runtime.overlap_pipeline or runtime.kernels:
        return 0.0
    if slower_links(profile, strategy, cluster):
        return 0.0
    cut, own = cut_stages(profile, strategy, cluster), slice(None, None, strategy.pp)
    passing = sum(each.backward for each in cut.passes[own]) + sum(cut.adds[own])
    operation, width = reduction(runtime, strategy), reduced(profile, strategy)
    sent = sum(seconds_of(operation, round(width * size), strategy, "replicas", cluster) for size in cut.trained[own])
    dealt = sum(cut.trained[own]) if strategy.zero == 1 and runtime.owners else 0
    after = seconds_of("broadcast", dealt, strategy, "replicas", cluster)
    return staged_seconds(profile, strategy, cluster) + max(0.0, sent - passing) + after


def least_seconds(profile: ProfileSummary, strategy: Strategy, cluster: Cluster) -> float:
    """Bound the step time of one strategy from below, in seconds; its number of microbatches must be settled."""
    times = times_of(profile, cluster, strategy)
    filled, computing = _passes(profile, strategy, cluster)
    update = _update(profile, strategy, times)
    if strategy.splits_parameters:
        channel = _gathers(strategy, cluster, profile)
        blocking = times.seconds.device.kind == "cpu"
        filled += _unhidden(strategy, cluster, profile, times)
        return max(filled, computing + update + (channel if blocking else 0.0), channel)
    if strategy.replicas == 1:
        return max(filled, computing + update)
    size = 0 if strategy.compress else round(reduced(profile, strategy) * profile.gradients) // strategy.pp
    sent = seconds_of(reduction(profile.runtime, strategy), size, strategy, "replicas", cluster)
    last = computing / strategy.microbatches - (times.forward + times.weights) / strategy.pp  # backward, recomputing
    return max(filled, computing + update, computing - last + sent + update)


def _filled(profile: ProfileSummary, strategy: Strategy, forward: float, one: float) -> float:
    """Bound a pipeline's seconds from its first pass to its last, if one microbatch takes `one` through all stages."""
    count, workers = strategy.microbatches, strategy.pp
    if strategy.schedule in ("1f1b", "gpipe"):
        return one * (1 + (count - 1) / workers)
    if strategy.schedule == "zero-bubble":  # weight gradients are postponed while the pipeline fills
        short = forward + INPUTS * (one - forward)
        return short * (1 + (min(count, workers) - 1) / workers) + max(count - workers, 0) * one / workers
    filling = one * (workers - 1) / workers / strategy.stages_per_worker  # interleaved: time to fill equal stages
    return one * count / workers + even(profile, workers * strategy.stages_per_worker) * filling


def _update(profile: ProfileSummary, strategy: Strategy, times: Times) -> float:
    """Return the seconds of the mean worker's optimizer step, timed as one kernel over all of its parameters."""
    elements = profile.elements / strategy.pp / owners(strategy)
    moved = sum(kernel.bytes for kernel in profile.update.of(strategy).kernels) * elements
    if moved < 1:
        return 0.0
    return times.seconds.kernels.seconds(Kernel("copy", "memory", "float32", 0.0, moved, (max(1, round(elements)),)))


def _gathers(strategy: Strategy, cluster: Cluster, profile: ProfileSummary) -> float:
    """Return the seconds of a step's all-gathers and reduce-scatters by `fully_shard`: those of the first stage.

    All stages gather and scatter equally often: in a pipeline with zero=3, once more often than there are microbatches.
    """
    size = (profile.repeated if strategy.runs_module else profile.own) // strategy.pp
    syncs = [(turn.count, turn.sync) for turn in turns(strategy, 0) if turn.action.stage == 0 and turn.sync is not None]
    gathers = sum(count for count, sync in syncs if sync.blocks)
    scatters = sum(count for count, sync in syncs if sync.reduces)
    return gathers * gather_seconds(profile, size, strategy, cluster) + scatters * scatter_seconds(
        profile, size, strategy, cluster
    )


def _unhidden(strategy: Strategy, cluster: Cluster, profile: ProfileSummary, times: Times) -> float:
    """Return the seconds that all stages of a pipeline together wait before the first microbatch and after the last.

    Each stage gathers as the first microbatch arrives and scatters as the last one goes back. Only the time beyond the
    computation of that microbatch counts.
    """
    if strategy.pp == 1:
        return 0.0
    gather = gather_seconds(profile, profile.own, strategy, cluster)
    scatter = scatter_seconds(profile, profile.own, strategy, cluster)
    again = times.again if strategy.recomputes else 0.0  # at most
    return max(0.0, gather - times.forward) + max(0.0, scatter - times.backward - times.weights - again)


def gather_seconds(profile: Profile | ProfileSummary, size: int, strategy: Strategy, cluster: Cluster) -> float:
    """Return the seconds in which `fully_shard` gathers `size` bytes of parameters."""
    return seconds_of("all_gather", round(profile.gathered * size), strategy, "fsdp", cluster)


def scatter_seconds(profile: Profile | ProfileSummary, size: int, strategy: Strategy, cluster: Cluster) -> float:
    """Return the seconds in which `fully_shard` reduces and scatters the gradients of `size` bytes of parameters.

    Compressed ones are not bounded from below: 0.
    """
    sent = 0 if strategy.compress else round(scattered(profile, strategy) * size)
    return seconds_of("reduce_scatter", sent, strategy, "fsdp", cluster)


def seconds_of(operation: str, size: int, strategy: Strategy, axis: str, cluster: Cluster) -> float:
    """Return the seconds of a collective over the first group of an axis, cached."""
    group = group_of(strategy, axis)
    if group.size == 1 or not size:
        return 0.0
    return _collective(operation, size, group.size, group.stride, Same(cluster))


@lru_cache(maxsize=65536)
def _collective(operation: str, size: int, ranks: int, stride: int, cluster: Same[Cluster]) -> float:
    return collective_seconds(Collective(operation, size, Group(ranks, stride)), cluster.value)
