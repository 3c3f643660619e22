"""What a strategy needs at least of the device that needs most, from sums over its profile alone.

    updating    parameters and the optimizer's state, with the gradients
    passing     the same while a microbatch goes backwards, with what the worker that has most under way keeps of them:
                all of it, or what blocks hand to each other where they are computed again, with the results of products
                where these stay; a later microbatch than the first finds gradients, whole ones of a stage that
                `fully_shard` looks after

Both are the mean over the workers of a pipeline, for which stages count as nearly equal (`even`).
"""

from __future__ import annotations

from shardwise.parallel.planning import MOST_BLOCKS
from shardwise.predict.condensed import Condensed
from shardwise.strategy import Strategy

EVEN = 0.5
"""Of a pipeline of equal stages, the time to fill it and what a worker keeps where its stages are not equal."""


def least_memory(profile: Condensed, strategy: Strategy, saved: float | None = None) -> float:
    """Bytes of the device that needs most, for this strategy (its number of microbatches settled).

    `saved`: of one microbatch, where part of the blocks is computed again, what the others keep.
    """
    workers, stages, count = strategy.pp, strategy.pp * strategy.stages_per_worker, strategy.microbatches
    slices = strategy.fsdp if strategy.splits_parameters else 1
    stays = _stays(profile, strategy)
    updating = (stays + profile.gradients / slices) / workers
    if strategy.offload:  # on the host, but for what cannot be split
        stays = updating = 0.0
    stays /= workers
    if strategy.splits_parameters and strategy.zero == 2 and stages > 1:
        stays += profile.own / stages
    buckets = strategy.sums_in_buckets and strategy.tp == strategy.pp == 1  # those of DDP are there from the start
    first = _kept(profile, strategy, saved, count) + (profile.gradients if buckets else 0)
    later = _gradients(profile, strategy, slices) + _kept(profile, strategy, saved, count - (workers > 1))
    return max(updating, stays + first, stays + later if count > 1 else 0.0, profile.largest)


def most_of_the_model(profile: Condensed, strategy: Strategy, room: int) -> list[float]:
    """The largest part of the model that each worker of a pipeline of one stage each has room for, at most.

    1f1b keeps a microbatch less on each further worker, which therefore may have more layers. Parameters and what is
    kept count as spread alike over the model, which is nearly so where it is deep.
    """
    stays, count = _stays(profile, strategy), strategy.microbatches
    if count > 1 and not strategy.splits_parameters:
        stays += profile.gradients
    kept = [count if strategy.schedule == "gpipe" else min(count, strategy.pp - place) for place in range(strategy.pp)]
    return [room / max(1.0, stays + microbatches * profile.saved) for microbatches in kept]


def _stays(profile: Condensed, strategy: Strategy) -> float:
    """Bytes of the parameters and of the optimizer's state that stay on all workers of a pipeline together."""
    slices = strategy.fsdp if strategy.splits_parameters else 1
    return profile.parameters / slices + profile.elements * profile.update.state_bytes / owners(strategy)


def _kept(profile: Condensed, strategy: Strategy, saved: float | None, count: int) -> float:
    """Bytes of activations of the worker that keeps most of them, of so many microbatches."""
    workers, stages = strategy.pp, strategy.pp * strategy.stages_per_worker
    under_way = _under_way(workers, count, strategy.schedule, strategy.stages_per_worker)
    share = even(profile, workers)
    if saved is None and strategy.recomputes:
        return share * (_handed(profile, strategy, stages) + _products(profile, strategy)) * under_way / workers
    kept = (profile.saved if saved is None else saved) / workers
    return kept * (max(share * under_way, 1) if workers > 1 else 1)


def _gradients(profile: Condensed, strategy: Strategy, slices: int) -> float:
    """Bytes of gradients that are there in a backward pass that is not the first one."""
    alone = strategy.tp == strategy.pp == 1
    if strategy.sums_in_buckets and alone:  # twice, with DDP's buckets
        return profile.gradients * 2.0
    if not strategy.splits_parameters:
        return profile.gradients / strategy.pp
    if alone:
        return 0.0 if strategy.offload else profile.gradients / slices
    return profile.own / (strategy.pp * strategy.stages_per_worker)  # whole ones, of one stage at a time


def _handed(profile: Condensed, strategy: Strategy, stages: int) -> float:
    """Bytes that blocks hand to each other and keep of one microbatch, where they are computed again."""
    if strategy.tp == strategy.pp == 1 or "/" in strategy.recompute:
        return 0.0
    between = min(max(profile.narrow - stages + 1, 0), stages * (MOST_BLOCKS - 1))
    return float(profile.message * (between + stages - 1))


def _products(profile: Condensed, strategy: Strategy) -> int:
    """Bytes of results of products that stay of one microbatch, where the rest is computed again."""
    if not strategy.keeps_products:
        return 0
    return profile.repeated_products if strategy.tp == strategy.pp == 1 else profile.products


def _under_way(workers: int, microbatches: int, schedule: str, stages: int) -> float:
    """Microbatches whose activations the worker that has most of them keeps, parts of several stages added up."""
    if schedule == "gpipe":
        return microbatches
    if schedule == "interleaved":
        return min(microbatches, (2 * (workers - 1) + (stages - 1) * workers + 1) / stages)
    return min(microbatches, workers)


def even(profile: Condensed, parts: int) -> float:
    """Of what a pipeline of so many equal parts would have in each, what the first has at least: one or two less of
    the pieces that the step is made of.
    """
    return max(EVEN, 1 - 2 * parts / profile.narrow) if profile.narrow else EVEN


def owners(strategy: Strategy) -> int:
    """Over how many replicas the optimizer's work is spread."""
    if strategy.zero == 1:
        return strategy.replicas
    return strategy.fsdp if strategy.splits_parameters else 1
