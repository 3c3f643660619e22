"""Lower bounds of a strategy's memory on the device that needs most, from sums over its profile alone.

    updating    parameters and optimizer state, with the gradients
    passing     parameters and optimizer state during a backward pass, with the activations in flight on the worker that
                has most of them: everything saved, or with recomputation the messages between blocks, plus the matmul
                results where these are saved; from the second microbatch on also gradients. Stages that `fully_shard`
                manages may be gathered, with unsharded gradients: one of them, or all where all are at once

Both are the mean over the workers of a pipeline, for which stages count as nearly equal (`even`).
"""

from __future__ import annotations

from shardwise.cluster.cluster import Device
from shardwise.predict.closed_form.device_memory import at_least, left_for_tensors
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.predict.runtime.element_bytes import WIDE, element_bytes
from shardwise.predict.workers.passes import Moment, moments
from shardwise.splitting.balance import PIECES
from shardwise.strategy import Strategy

EVEN = 0.5
"""Least ratio of an unequal pipeline to one of equal stages, for the fill time and for a worker's activations."""


def least_memory(profile: ProfileSummary, strategy: Strategy, device: Device, saved: float | None = None) -> float:
    """Bound the bytes of the device that needs most from below; the number of microbatches must be settled.

    `device` says what a worker needs beside its tensors. `saved` is set if a part of the blocks is recomputed: bytes
    per microbatch that the other blocks save.
    """
    workers = strategy.pp
    slices = strategy.fsdp if strategy.splits_parameters else 1
    stays = _stays(profile, strategy)
    updating = (stays + _accumulated(profile, strategy) / slices) / workers
    if strategy.offload:  # on the host, except for what cannot be split
        stays = updating = 0.0
    stays /= workers
    if _in_buffers(profile, strategy):
        stays += _accumulated(profile, strategy) / workers
    backward = (each for each in moments(strategy, 0) if not each.forward)  # the first worker has most in flight
    passing = max(
        _gathered(profile, strategy, each)
        + _gradients(profile, strategy, each, slices)
        + _saved(profile, strategy, saved, each)
        for each in backward
    )
    return at_least(max(updating, stays + passing, profile.largest), device, strategy)


def most_of_the_model(profile: ProfileSummary, strategy: Strategy, device: Device, room: int) -> list[float]:
    """Return the largest share of the model that fits on each worker of a pipeline with one stage per worker.

    Under 1f1b each further worker has one microbatch less in flight, so it may have more layers. Parameters and saved
    activations count as spread evenly over the model, which nearly holds for deep models. The result is an upper
    bound and may exceed 1; `room` is in bytes.
    """
    stays, count = _stays(profile, strategy), strategy.microbatches
    if count > 1 and not strategy.splits_parameters:
        stays += _accumulated(profile, strategy)
    in_flight = [
        count if strategy.schedule == "gpipe" else min(count, strategy.pp - pipeline_rank)
        for pipeline_rank in range(strategy.pp)
    ]
    tensors = max(0.0, left_for_tensors(room, device, strategy))
    return [tensors / max(1.0, stays + microbatches * profile.saved) for microbatches in in_flight]


def _stays(profile: ProfileSummary, strategy: Strategy) -> float:
    """Return the bytes of parameters and optimizer state that stay on all workers of a pipeline together."""
    slices = strategy.fsdp if strategy.splits_parameters else 1
    each = element_bytes(profile.runtime, profile.precision, strategy)
    weights = profile.parameters * each.weights / WIDE
    state = profile.update.of(strategy).state_bytes + each.copies
    return weights / slices + profile.elements * state / owners(strategy)


def _accumulated(profile: ProfileSummary, strategy: Strategy) -> float:
    """Return the bytes of all gradients on all workers of a pipeline together, as their software keeps them."""
    each = element_bytes(profile.runtime, profile.precision, strategy).gradients
    shards = strategy.replicas if profile.runtime.sharded_gradients and not strategy.splits_parameters else 1
    return profile.gradients * each / WIDE / shards


def _in_buffers(profile: ProfileSummary, strategy: Strategy) -> bool:
    """Return whether gradients have buffers of their own from the start, in software that allocates them so."""
    return (profile.runtime.kernels or profile.runtime.own_gradients) and not strategy.splits_parameters


def _has_buckets(profile: ProfileSummary, strategy: Strategy) -> bool:
    """Return whether DDP's buckets lie beside the gradients."""
    return strategy.sums_in_buckets and strategy.runs_module and not _in_buffers(profile, strategy)


def _saved(profile: ProfileSummary, strategy: Strategy, saved: float | None, moment: Moment) -> float:
    """Return the bytes of saved activations on the worker that has most of them."""
    workers, stages = strategy.pp, strategy.pp * strategy.stages_per_worker
    under_way = moment.saved / strategy.stages_per_worker  # parts of several stages add up
    share = even(profile, workers)
    if saved is None and strategy.recomputes:
        return share * (_handed(profile, strategy, stages) + _products(profile, strategy)) * under_way / workers
    per_microbatch = (profile.saved if saved is None else saved) / workers
    return per_microbatch * (max(share * under_way, 1) if workers > 1 else 1)


def _gathered(profile: ProfileSummary, strategy: Strategy, moment: Moment) -> float:
    """Return the bytes of gathered parameters where forward passes leave them: of one stage, or of all if all are."""
    if moment.sync is None or strategy.zero == 3 or strategy.pp == 1:
        return 0.0
    return profile.gathered * _of_stages(profile, strategy, every=moment.others_gathered)


def _of_stages(profile: ProfileSummary, strategy: Strategy, *, every: bool) -> float:
    """Return the bytes of the parameters of one stage, or of `every` stage of a worker."""
    workers, count = strategy.pp, strategy.stages_per_worker
    return profile.own / workers * (max(1 / count, even(profile, workers * count)) if every else 1 / count)


def _gradients(profile: ProfileSummary, strategy: Strategy, moment: Moment, slices: int) -> float:
    """Return the bytes of gradients that exist as a backward pass begins."""
    if _in_buffers(profile, strategy):
        return 0.0  # they are there already
    if _has_buckets(profile, strategy):  # DDP allocates its buckets at the start; later there are gradients, too
        return profile.gradients * (2.0 if moment.later else 1.0)
    if not moment.later:
        return 0.0
    if moment.sync is None:
        return profile.gradients / strategy.pp
    if moment.sync.reduces:
        return 0.0 if strategy.offload else profile.gradients / slices
    return profile.reduced * _of_stages(profile, strategy, every=moment.others_unsharded)


def _handed(profile: ProfileSummary, strategy: Strategy, stages: int) -> float:
    """Return the bytes of messages between blocks that are saved per microbatch if the blocks are recomputed."""
    if strategy.runs_module or strategy.recompute.partial:
        return 0.0
    between = max(profile.narrow // PIECES - stages, 0)
    return float(profile.message * (between + stages - 1))


def _products(profile: ProfileSummary, strategy: Strategy) -> int:
    """Return the bytes of matmul results that are saved per microbatch if the rest is recomputed."""
    if not strategy.saves_products:
        return 0
    return profile.repeated_products if strategy.runs_module else profile.products


def even(profile: ProfileSummary, parts: int) -> float:
    """Return the least size of a pipeline's first part relative to an equal part.

    The first of `parts` equal parts may lack one or two of the segments that the step is made of.
    """
    return max(EVEN, 1 - 2 * parts / profile.narrow) if profile.narrow else EVEN


def owners(strategy: Strategy) -> int:
    """Return the number of replicas over which the optimizer's work is spread."""
    if strategy.zero == 1:
        return strategy.replicas
    return strategy.fsdp if strategy.splits_parameters else 1
