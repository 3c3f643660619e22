"""What a strategy costs at least, from sums over its profile alone: what cannot win is not looked at closer.

With T seconds of one microbatch through all stages, B of its backward pass, m microbatches, p workers of a pipeline:

    computing      each worker computes its part of every microbatch, and updates its part of the parameters;
                   a pipeline of one stage each also fills and drains once: T (1 + (m - 1) / p), else m T / p
    gradients      can be sent from the last backward pass on: m T / p - B / p + all-reduce
    gathers        `fully_shard` gathers and scatters on one channel: a step takes as long as those at least; where they
                   block (on a CPU) they come on top
    messages       one microbatch goes through all workers and back
    memory         the mean over the workers of a pipeline: parameters and the optimizer's state, with the gradients
                   (when it updates), or with what is there while the last microbatch goes backwards: gradients, and of
                   the worker that has most microbatches under way half of what equal stages would keep

No strategy costs less (tests hold all strategies of small jobs against their bounds), so that nothing is lost by
leaving out what cannot be better than what is known.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import accumulate, pairwise

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.parallel.planning import MOST_BLOCKS
from shardwise.predict.condensed import Condensed, Times, times_of
from shardwise.predict.kernel import Kernel
from shardwise.predict.kernels import collective_seconds
from shardwise.predict.parts import cuts_of, group_of
from shardwise.predict.pipelines import StageTime, alone, pipeline_seconds
from shardwise.predict.profile import Profile
from shardwise.predict.timing import Timed, timed
from shardwise.strategy import Strategy

INPUTS = 0.4
"""Of a backward pass, the least that gradients of inputs take; half where both are products of one size."""


EVEN = 0.5
"""Of a pipeline of equal stages, the time to fill it and what a worker keeps where its stages are not equal."""


def family_seconds(profile: Condensed, strategy: Strategy, cluster: Cluster) -> float:
    """Of a step of all strategies that differ from this one in how replicas keep parameters: what is computed alone."""
    return max(_passes(profile, strategy, cluster))


def _passes(profile: Condensed, strategy: Strategy, cluster: Cluster) -> tuple[float, float]:
    """Seconds that the pipeline is busy from its first pass to its last, and that its mean worker computes."""
    times = times_of(profile, cluster, strategy)
    one = times.forward + times.backward + times.weights
    if strategy.recompute == "full":  # without tp and pp only repeated blocks are computed again
        one += times.repeated if strategy.tp == strategy.pp == 1 else times.again
    filled = _filled(profile, strategy, times.forward, one) + _trip(profile, strategy, cluster)
    return filled, one * strategy.microbatches / strategy.pp


def _trip(profile: Condensed, strategy: Strategy, cluster: Cluster) -> float:
    """Of one microbatch through the workers of a pipeline and back: its messages, over the shortest way there is."""
    if strategy.pp == 1 or not profile.message:
        return 0.0
    return 2 * (strategy.pp - 1) * _collective("send", profile.message, 2, strategy.tp, _Same(cluster))


def staged_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Of a step of a family's strategies: what is computed alone, by stages as they are cut.

    Slower to know than `family_seconds`, and closer: stages are not equal, and the slowest worker is waited for.
    """
    stages = _stages(profile, strategy, cluster)
    workers, count = strategy.pp, strategy.microbatches
    if strategy.schedule == "zero-bubble":  # its backward passes are known together
        before, best = 0.0, alone(stages)
        for stage in stages:
            before += stage.arrives
            best = max(best, before + count * (stage.forward + stage.backward))
            before += stage.forward
        return best
    return pipeline_seconds(strategy.schedule, stages, workers, count)


def _stages(profile: Profile, strategy: Strategy, cluster: Cluster) -> list[StageTime]:
    times = timed(profile, cluster, strategy)
    key = ("bounds", "stages", id(times), strategy.pp, strategy.stages_per_worker, strategy.recompute)
    if key not in profile.kept:
        profile.kept[key] = _cut_in_stages(profile, strategy, cluster, times)
    found = profile.kept[key]
    assert isinstance(found, list)
    return found


def _cut_in_stages(profile: Profile, strategy: Strategy, cluster: Cluster, times: Timed) -> list[StageTime]:
    starts = [blocks[0] for blocks in cuts_of(profile, strategy, times.forward.each)]
    again = list(accumulate((_again(profile, times, link) for link in range(len(profile.links))), initial=0.0))
    message = 0.0
    if strategy.pp > 1:
        least = min(link.message for link in profile.links[1:])
        message = _collective("send", least, 2, strategy.tp, _Same(cluster)) if least else 0.0
    found = []
    for first, end in pairwise([*starts, len(profile.links)]):
        backward = times.backward.between(first, end).device + times.weights.between(first, end).device
        if strategy.recompute == "full":
            backward += again[end] - again[first]
        received = message if first else 0.0
        sends = message if end < len(profile.links) else 0.0
        found.append(StageTime(times.forward.between(first, end).device, backward, 0.0, received, sends))
    return found


def _again(profile: Profile, times: Timed, link: int) -> float:
    return times.recomputed[link].total if profile.links[link].layer.keeps else 0.0


def least_seconds(profile: Condensed, strategy: Strategy, cluster: Cluster) -> float:
    """Of a step of this strategy (its number of microbatches settled)."""
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
    sent = _seconds("all_reduce", profile.gradients // strategy.pp, strategy, "replicas", cluster)
    return max(filled, computing + update, computing - times.backward / strategy.pp + sent + update)


def _filled(profile: Condensed, strategy: Strategy, forward: float, one: float) -> float:
    """Of a pipeline, from its first pass to its last: `one` microbatch through all stages takes so long."""
    count, workers = strategy.microbatches, strategy.pp
    if strategy.schedule in ("1f1b", "gpipe"):
        return one * (1 + (count - 1) / workers)
    if strategy.schedule == "zero-bubble":  # weights are put off while the pipeline fills
        short = forward + INPUTS * (one - forward)
        return short * (1 + (min(count, workers) - 1) / workers) + max(count - workers, 0) * one / workers
    filling = one * (workers - 1) / workers / strategy.stages_per_worker  # interleaved: of stages of equal length
    return one * count / workers + _even(profile, workers * strategy.stages_per_worker) * filling


def _update(profile: Condensed, strategy: Strategy, times: Times) -> float:
    """Of the mean worker: as one kernel for all of its parameters."""
    elements = profile.elements / strategy.pp / _owners(strategy)
    moved = sum(kernel.bytes for kernel in profile.update.kernels) * elements
    if moved < 1:
        return 0.0
    return times.seconds.kernels.seconds(Kernel("copy", "memory", "float32", 0.0, moved, (max(1, round(elements)),)))


def _owners(strategy: Strategy) -> int:
    """Over how many replicas the optimizer's work is spread."""
    if strategy.zero == 1:
        return strategy.replicas
    return strategy.fsdp if strategy.splits_parameters else 1


def _gathers(strategy: Strategy, cluster: Cluster, profile: Condensed) -> float:
    """Of a step: what `fully_shard` gathers and scatters of blocks; see `predict.issuing.syncs`.

    With tp or pp gradients are scattered once, and with zero=3 a stage's blocks are gathered for each microbatch's
    forward pass that follows another one and for each backward pass that follows a forward pass: once more often than
    there are microbatches, whatever the order. Without, each microbatch gathers and scatters.
    """
    alone, count = strategy.tp == strategy.pp == 1, strategy.microbatches
    size = (profile.repeated if alone else profile.own) // strategy.pp
    gather = _seconds("all_gather", size, strategy, "fsdp", cluster)
    scatter = _seconds("reduce_scatter", size, strategy, "fsdp", cluster)
    if alone:
        return ((2 if strategy.zero == 3 else 1) * gather + scatter) * count
    return (count + 1 if strategy.zero == 3 else 1) * gather + scatter


def _unhidden(strategy: Strategy, cluster: Cluster, profile: Condensed, times: Times) -> float:
    """Of a pipeline: what all stages, one after the other, wait for before the first microbatch and behind the last.

    Each gathers as the first microbatch comes, and scatters as the last one goes back, beside computing them.
    """
    if strategy.pp == 1:
        return 0.0
    gather = _seconds("all_gather", profile.own, strategy, "fsdp", cluster)
    scatter = _seconds("reduce_scatter", profile.own, strategy, "fsdp", cluster)
    again = times.again if strategy.recompute == "full" else 0.0
    return max(0.0, gather - times.forward) + max(0.0, scatter - times.backward - times.weights - again)


def _seconds(operation: str, size: int, strategy: Strategy, axis: str, cluster: Cluster) -> float:
    group = group_of(strategy, axis)
    if group.size == 1 or not size:
        return 0.0
    return _collective(operation, size, group.size, group.stride, _Same(cluster))


class _Same:
    """A cluster by its identity, which is quicker to look up than its value."""

    def __init__(self, cluster: Cluster) -> None:
        self.cluster = cluster

    def __hash__(self) -> int:
        return id(self.cluster)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.cluster is other.cluster


@lru_cache(maxsize=65536)
def _collective(operation: str, size: int, ranks: int, stride: int, cluster: _Same) -> float:
    return collective_seconds(Collective(operation, size, Group(ranks, stride)), cluster.cluster)


def least_memory(profile: Condensed, strategy: Strategy) -> float:
    """Bytes of the device that needs most, for this strategy (its number of microbatches settled)."""
    workers, stages = strategy.pp, strategy.pp * strategy.stages_per_worker
    slices = strategy.fsdp if strategy.splits_parameters else 1
    stays = profile.parameters / slices + profile.elements * profile.update.state_bytes / _owners(strategy)
    updating = (stays + profile.gradients / slices) / workers
    held = _gradients(profile, strategy, slices) / workers
    if strategy.splits_parameters and stages > 1:  # of one stage at a time
        held += (profile.own if _several(strategy) else 0) / stages
        held += profile.own / stages if strategy.zero == 2 else 0
    under_way = _under_way(workers, strategy.microbatches, strategy.schedule, strategy.stages_per_worker)
    even = _even(profile, workers)
    if strategy.recompute == "full":
        kept = even * _handed(profile, strategy, stages) * under_way / workers
    elif workers == 1:
        kept = profile.saved
    else:
        kept = max(even * under_way, 1) * profile.saved / workers
    return max(updating, stays / workers + held + kept, profile.largest)


def _even(profile: Condensed, parts: int) -> float:
    """Of what a pipeline of so many equal parts would have in each, what the first has at least: one or two less of
    the pieces that the step is made of.
    """
    return max(EVEN, 1 - 2 * parts / profile.narrow) if profile.narrow else EVEN


def _several(strategy: Strategy) -> bool:
    """Whether gradients are there before the last backward pass begins."""
    return strategy.microbatches > 1


def _gradients(profile: Condensed, strategy: Strategy, slices: int) -> float:
    """Bytes of gradients that are there in the last backward pass, of all workers of a pipeline together."""
    alone = strategy.tp == strategy.pp == 1
    if strategy.replicas > 1 and alone and not strategy.splits_parameters:  # DDP's buckets
        return profile.gradients * (2.0 if _several(strategy) else 1.0)
    return profile.gradients / slices if _several(strategy) else 0.0


def _handed(profile: Condensed, strategy: Strategy, stages: int) -> float:
    """Bytes that blocks hand to each other and keep of one microbatch, where they are computed again."""
    if strategy.tp == strategy.pp == 1:
        return 0.0
    between = min(max(profile.narrow - stages + 1, 0), stages * (MOST_BLOCKS - 1))
    return float(profile.message * (between + stages - 1))


def _under_way(workers: int, microbatches: int, schedule: str, stages: int) -> float:
    """Microbatches whose activations the worker that has most of them keeps, parts of several stages added up."""
    if schedule == "gpipe":
        return microbatches
    if schedule == "interleaved":
        return min(microbatches, (2 * (workers - 1) + (stages - 1) * workers + 1) / stages)
    return min(microbatches, workers)
