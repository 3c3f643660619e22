"""What a strategy costs at least, from sums over its profile alone: what cannot win is not looked at closer.

With T seconds of one microbatch through all stages, B of its backward pass, m microbatches, p workers of a pipeline:

    computing      each worker computes its part of every microbatch, and updates its part of the parameters;
                   a pipeline of one stage each also fills and drains once: T (1 + (m - 1) / p), else m T / p
    gradients      can be sent from the last backward pass on: m T / p - B / p + all-reduce
    gathers        `fully_shard` gathers and scatters on one channel: a step takes as long as those at least; where they
                   block (on a CPU) they come on top
    memory         the mean over the workers of a pipeline: parameters and the optimizer's state, with the gradients
                   (when it updates) or with what the backward pass needs of one microbatch (when that begins); of the
                   worker that has most microbatches under way, half of what equal stages would keep

No strategy costs less (tests hold all strategies of small jobs against their bounds), so that nothing is lost by
leaving out what cannot be better than what is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict.kernel import Kernel
from shardwise.predict.kernels import collective_seconds
from shardwise.predict.parts import group_of, module_blocks
from shardwise.predict.profile import Layer, Profile
from shardwise.predict.timing import Timed, timed
from shardwise.strategy import Strategy

INPUTS = 0.4
"""Of a backward pass, the least that gradients of inputs take; half where both are products of one size."""


EVEN = 0.5
"""Of a pipeline of equal stages, the time to fill it and what a worker keeps where its stages are not equal."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """Sums over a profile: bytes of parameters and buffers, of gradients; trained elements; bytes kept of a microbatch.

    `largest` is the most that one link needs while it goes backwards, which recomputation needs too.
    """

    parameters: int
    gradients: int
    elements: int
    kept: int
    largest: int

    @classmethod
    def of(cls, profile: Profile) -> Sizes:
        """Of a profile; kept with it."""
        key = ("bounds", "sizes")
        if key not in profile.kept:
            trained = [parameter for parameter in profile.parameters if parameter.trained]
            profile.kept[key] = cls(
                sum(parameter.bytes for parameter in profile.parameters),
                sum(parameter.bytes for parameter in trained),
                sum(parameter.elements for parameter in trained),
                profile.saved[-1],
                max((_backwards(link.layer) for link in profile.links), default=0),
            )
        found = profile.kept[key]
        assert isinstance(found, Sizes)
        return found


def _backwards(layer: Layer) -> int:
    return layer.inside + max(layer.temporary_backward, layer.temporary_forward)


def family_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Of a step of all strategies that differ from this one in how replicas keep parameters: what is computed alone."""
    return max(_passes(profile, strategy, timed(profile, cluster, strategy)))


def _passes(profile: Profile, strategy: Strategy, times: Timed) -> tuple[float, float]:
    """Seconds that the pipeline is busy from its first pass to its last, and that its mean worker computes."""
    forward = times.forward.total[-1]
    one = forward + times.backward.total[-1] + times.weights.total[-1]
    if strategy.recompute == "full":
        one += _again(profile, strategy, times)
    return _filled(strategy, forward, one), one * strategy.microbatches / strategy.pp


def least_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Of a step of this strategy (its number of microbatches settled)."""
    times, sizes = timed(profile, cluster, strategy), Sizes.of(profile)
    backward, workers = times.backward.total[-1], strategy.pp
    filled, computing = _passes(profile, strategy, times)
    update = _update(profile, strategy, times, sizes)
    if strategy.splits_parameters:
        channel = _gathers(strategy, cluster, sizes)
        return max(filled, computing + update + (channel if times.device.kind == "cpu" else 0.0), channel)
    if strategy.replicas == 1:
        return max(filled, computing + update)
    sent = _seconds("all_reduce", sizes.gradients // workers, strategy, "replicas", cluster)
    return max(filled, computing + update, computing - backward / workers + sent + update)


def _again(profile: Profile, strategy: Strategy, times: Timed) -> float:
    """Of one microbatch, what is computed again at least: each link up to what its backward pass needs."""
    alone = strategy.tp == strategy.pp == 1
    key = ("bounds", "again", id(times), alone)
    if key not in profile.kept:
        links = list(range(len(profile.links)))
        if alone:  # only repeated blocks are computed again
            links = sorted({link for first, end in module_blocks(profile) for link in range(first, end)})
        profile.kept[key] = sum(times.recomputed[link].total for link in links if profile.links[link].layer.keeps)
    found = profile.kept[key]
    assert isinstance(found, int | float)
    return float(found)


def _filled(strategy: Strategy, forward: float, one: float) -> float:
    """Of a pipeline, from its first pass to its last: `one` microbatch through all stages takes so long."""
    count, workers = strategy.microbatches, strategy.pp
    if strategy.schedule in ("1f1b", "gpipe"):
        return one * (1 + (count - 1) / workers)
    if strategy.schedule == "zero-bubble":  # weights are put off while the pipeline fills
        short = forward + INPUTS * (one - forward)
        return short * (1 + (min(count, workers) - 1) / workers) + max(count - workers, 0) * one / workers
    filling = one * (workers - 1) / workers / strategy.stages_per_worker  # interleaved: of stages of equal length
    return one * count / workers + EVEN * filling


def _update(profile: Profile, strategy: Strategy, times: Timed, sizes: Sizes) -> float:
    """Of the mean worker: as one kernel for all of its parameters."""
    elements = sizes.elements / strategy.pp / _owners(strategy)
    moved = sum(kernel.bytes for kernel in profile.update.kernels) * elements
    if moved < 1:
        return 0.0
    return times.kernel(Kernel("copy", "memory", "float32", 0.0, moved, (max(1, round(elements)),)))


def _owners(strategy: Strategy) -> int:
    """Over how many replicas the optimizer's work is spread."""
    if strategy.zero == 1:
        return strategy.replicas
    return strategy.fsdp if strategy.splits_parameters else 1


def _gathers(strategy: Strategy, cluster: Cluster, sizes: Sizes) -> float:
    """Of a step: parameters are gathered and gradients scattered once, without tp and pp once for each microbatch."""
    size = sizes.gradients // strategy.pp
    gather = _seconds("all_gather", size, strategy, "fsdp", cluster)
    scatter = _seconds("reduce_scatter", size, strategy, "fsdp", cluster)
    alone = strategy.tp == strategy.pp == 1
    return (gather + scatter) * (strategy.microbatches if alone else 1)


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


def least_memory(profile: Profile, strategy: Strategy) -> float:
    """Bytes of the device that needs most, for this strategy (its number of microbatches settled)."""
    sizes, workers = Sizes.of(profile), strategy.pp
    slices = strategy.fsdp if strategy.splits_parameters else 1
    stays = sizes.parameters / slices + sizes.elements * profile.update.state_bytes / _owners(strategy)
    kept = 0 if strategy.recompute == "full" else sizes.kept
    least = max((stays + max(sizes.gradients / slices, kept)) / workers, sizes.largest)
    if workers == 1 or strategy.recompute == "full":
        return least
    first = _under_way(workers, strategy.microbatches, strategy.schedule, strategy.stages_per_worker)
    return max(least, stays / workers + EVEN * kept / workers * first)


def _under_way(workers: int, microbatches: int, schedule: str, stages: int) -> float:
    """Microbatches whose activations the worker that has most of them keeps, parts of several stages added up."""
    if schedule == "gpipe":
        return microbatches
    if schedule == "interleaved":
        return min(microbatches, (2 * (workers - 1) + (stages - 1) * workers + 1) / stages)
    return min(microbatches, workers)
