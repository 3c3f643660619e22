"""Peak memory of one device in bytes, by category. It counts tensors, not the workspace inside of kernels.

The peak can occur at any segment of a backward pass, with its microbatches in flight, or in the optimizer. All of these
moments are computed, and the largest is the peak.

    parameters    parameters and buffers that this worker holds, and parameters that `fully_shard` has gathered; with
                  `schedule=pipedream` also the weights before the last update
    gradients     gradients of the parameters that it holds; all of them from the start of the backward pass if DDP's
                  buckets or earlier microbatches have allocated them
    optimizer     optimizer state, and what compression of gradients keeps
    activations   saved for the backward passes of all microbatches in flight (Korthikanti et al. 2022, section 4)
    temporary     short-lived tensors of passes, gradient buckets and the optimizer, and the batch

What a worker needs beside its tensors is in `device_memory`.
Sharded parameters, their gradients and their optimizer state do not count under `offload=1`: they lie on the host.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

from shardwise.cluster.cluster import Device
from shardwise.predict.closed_form.compression import state_bytes, temporary_bytes
from shardwise.predict.closed_form.device_memory import in_process
from shardwise.predict.closed_form.eight_bit import updated_alone
from shardwise.predict.closed_form.fsdp_memory import (
    StageMemory,
    held_at_segments,
    held_between_passes,
    held_in_forward,
)
from shardwise.predict.closed_form.offload import left, offloads
from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.prediction import Memory
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Profile, Segment
from shardwise.predict.runtime.element_bytes import WIDE, element_bytes
from shardwise.predict.workers.buckets import Block
from shardwise.predict.workers.holdings import Parts, Stage, Worker
from shardwise.predict.workers.passes import Left, Moment, Sync, moments
from shardwise.predict.workers.stage_keys import gathered_stage_key, stage_key
from shardwise.splitting.buckets import bucket_bytes
from shardwise.splitting.schedule import left_after
from shardwise.strategy import Strategy


def memory_of(profile: Profile, strategy: Strategy, parts: Parts, device: Device, *, ends: bool = False) -> Memory:
    """Return the memory of the pipeline worker that needs most.

    If `ends` is set, only the first and the last pipeline worker are computed: that is faster and a lower bound.
    """
    workers = parts.workers
    if ends and len(workers) > 1:
        workers = workers[:: len(workers) - 1]
    memories = (worker_memory(profile, strategy, worker, device) for worker in workers)
    return in_process(max(memories, key=lambda each: each.total), device, strategy)


def memory_at(profile: Profile, strategy: Strategy, worker: Worker, device: Device) -> Memory:
    """Return the memory of one pipeline worker, including that of its process."""
    return in_process(worker_memory(profile, strategy, worker, device), device, strategy)


def worker_memory(profile: Profile, strategy: Strategy, worker: Worker, device: Device) -> Memory:
    """Return the memory of one pipeline worker's tensors: the larger of the optimizer's peak and the passes' peak.

    The worker is the first of its tensor-parallel group in the first replica.
    """
    offloaded = offloads(strategy, device)
    if offloaded:
        worker = left(worker)
    elements, _ = worker.updated
    update = profile.update.of(strategy)
    each = element_bytes(profile.runtime, profile.precision, strategy)
    state = round(elements * (update.state_bytes + each.copies))
    state += state_bytes(strategy, worker) + _outer(strategy, worker)
    at_once = update.at_once("cpu" if offloaded else device.kind)
    updating = Memory(
        parameters=_stored(profile, strategy, worker),
        gradients=_accumulated(profile, strategy, worker),
        optimizer=state,
        activations=_left_saved(profile, strategy, worker),
        temporary=round(elements * update.temporary_bytes) if at_once else _one(profile, strategy, worker),
    )
    passing = _passing(profile, strategy, worker, state, offloaded=offloaded)
    underway = 2 * _averaged(worker) if strategy.delay else 0  # what was sent, and a copy of it
    moments = [replace(each, temporary=each.temporary + underway) for each in (updating, passing)]
    if strategy.delayed:  # gradients of two steps, and weights before the last update
        moments = [_twice(each, worker.trained, profile.batch_bytes * strategy.microbatches) for each in moments]
    if strategy.local:
        sent = _averaged(worker) * (2 if strategy.delay else 1)
        moments.append(replace(updating, temporary=sent + _merging(profile, strategy)))
    return max(moments, key=lambda memory: memory.total)


def _twice(memory: Memory, trained: int, batches: int) -> Memory:
    """Return the memory at a moment with the weights, gradients and batches of the step before as well."""
    return replace(
        memory,
        parameters=memory.parameters + trained,
        gradients=memory.gradients + trained,
        temporary=memory.temporary + batches,
    )


def _left_saved(profile: Profile, strategy: Strategy, worker: Worker) -> int:
    """Return the bytes saved for backward passes that a step leaves to the next one; 0 where it waits for them."""
    if not strategy.delayed:
        return 0
    left = left_after(worker.pipeline_rank, strategy.pp)
    return left * sum(_saved(profile, stage, products=strategy.saves_products) for stage in worker.stages)


def _outer(strategy: Strategy, worker: Worker) -> int:
    """Return the bytes of the outer optimizer of local steps: the last average, and momentum."""
    return 2 * worker.trained if strategy.local and strategy.outer == "nesterov" else 0


def _averaged(worker: Worker) -> int:
    """Return the bytes of the largest fragment that is averaged; 0 without local steps."""
    return max(map(sum, worker.averaged), default=0)


def _merging(profile: Profile, strategy: Strategy) -> int:
    """Return the temporary bytes in which the largest parameter takes its average."""
    return profile.largest * (strategy.outer == "nesterov" or bool(strategy.delay))


def _one(profile: Profile, strategy: Strategy, worker: Worker) -> int:
    """Return the temporary bytes of an update of the largest parameter alone; 0 if none is updated."""
    update = profile.update.of(strategy)
    if not worker.updated[1]:
        return 0
    if not update.one_by_one:
        return min(profile.largest, worker.trained)
    return round(updated_alone(profile, strategy, worker)[0] * update.temporary_bytes)


def _passing(profile: Profile, strategy: Strategy, worker: Worker, state: int, *, offloaded: bool) -> Memory:
    """Return the memory at the peak of the passes; those that are looked at are `moments`."""
    stages = {stage.number: stage for stage in worker.stages}
    products = strategy.saves_products
    saved = {number: _saved(profile, stage, products=products) for number, stage in stages.items()}
    module = strategy.runs_module
    batches = profile.batch_bytes * (1 if module else strategy.microbatches)  # a pipeline loads all at once
    found: list[Memory] = []
    copied = worker.parameters - worker.kept
    narrow = round(copied * element_bytes(profile.runtime, profile.precision, strategy).narrow / WIDE)
    compressing = temporary_bytes(strategy, worker)
    for moment in moments(strategy, worker.pipeline_rank):
        counts = moment.counts
        every = sum(count * saved[number] for number, count, _ in counts)
        every += sum(count * _put_off(profile, stages[number].first, stages[number].end) for number, _, count in counts)
        between = [_left(profile, strategy, stages[number], each) for number, each in moment.others]
        gathered = sum(round(profile.gathered * each.gathered) for each in between)
        gradients = 0 if offloaded else sum(each.slices for each in between)
        unsharded = sum(each.whole for each in between)
        for number in moment.stages:
            stage = stages[number]
            peak = _peak(profile, strategy, worker, stage, moment, offloaded=offloaded)
            found.append(
                Memory(
                    parameters=_stored(profile, strategy, worker) + narrow + peak.gathered + gathered,
                    gradients=peak.gradients + gradients,
                    optimizer=state,
                    activations=every - saved[number] + peak.activations + stage.received,
                    temporary=peak.temporary + unsharded + batches + compressing,
                )
            )
    return max(found, key=lambda memory: memory.total)


def _put_off(profile: Profile, first: int, end: int) -> int:
    """Return the bytes of a microbatch whose weight gradients of segments `first` to `end` are delayed (zero-bubble).

    They are the operands of the matmuls and convolutions that compute these gradients: inputs, and gradients of
    outputs. Returns 0 if the profile is not `split`.
    """
    if not profile.split:
        return 0
    sums = profile.memo.once(("put off",), lambda: tuple(accumulate(map(_operands, profile.segments), initial=0)))
    return sums[end] - sums[first]


def _operands(segment: Segment) -> int:
    kernels = [kernel for kernel in segment.layer.weights.kernels if kernel.kind in ("matmul", "convolution")]
    return round(sum(kernel.count * (kernel.bytes - _result(kernel)) for kernel in kernels))


def _result(kernel: Kernel) -> float:
    """Return the bytes of a matmul's result; 0 for other kernels."""
    return math.prod(kernel.shape[:3]) * ELEMENT_BYTES[kernel.dtype] if kernel.kind == "matmul" else 0.0


@dataclass(frozen=True, slots=True)
class _Peak:
    """Bytes at the peak of one backward pass of a stage; activations are those of this microbatch alone."""

    gathered: int
    gradients: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return self.gathered + self.gradients + self.activations + self.temporary


def _peak(
    profile: Profile, strategy: Strategy, worker: Worker, stage: Stage, moment: Moment, *, offloaded: bool
) -> _Peak:
    products, sync, later = strategy.saves_products, moment.sync, moment.later
    if sync is None:
        gradients_at = _gradients(profile, strategy, worker, later=later)
        candidates = _moments(profile, stage, products=products)
        peaks = [_Peak(0, *_beside(gradients_at(done), each, temporary)) for each, temporary, done in candidates]
        return max(peaks, key=lambda peak: peak.total)
    trained = worker.trained if sync.reduces else 0  # unsharded gradients do not depend on it
    own = (stage_key(profile, stage), trained, _traits(strategy), sync, products, later, moment.forward, offloaded)

    def highest() -> _Peak:
        if moment.forward:
            held = held_in_forward(profile, stage, sync, later=later)
            beside = _in_forward(profile, stage, products=products)
            inputs, once = [0] * len(beside), [0] * len(beside)
        else:
            held = _held(profile, strategy, stage, sync, trained, later=later)
            beside = [each[:2] for each in _every_moment(profile, stage, products=products)]
            segments = profile.segments[stage.first : stage.end][::-1]
            inputs, once = [each.message for each in segments], [each.layer.once for each in segments]
        peaks = []
        for each, (activations, temporary), entering, computed in zip(held, beside, inputs, once, strict=True):
            gathered, slices = round(profile.gathered * each.gathered), 0 if offloaded else each.slices
            peaks.append(_Peak(gathered, slices, activations, temporary + each.whole))
            if each.reducing:  # a loss in pieces has its gradients early: they are among the activations
                beside_them = temporary if computed else entering
                peaks.append(_Peak(gathered, slices, activations, beside_them + max(0, each.reducing - computed)))
        return max(peaks, key=lambda peak: peak.total)

    return profile.memo.once(("sharded peak", *own), highest)


def _held(
    profile: Profile, strategy: Strategy, stage: Stage, sync: Sync, trained: int, *, later: bool
) -> list[StageMemory]:
    """Return `held_at_segments` of a stage, cached for all stages that are equal up to their position."""
    key = ("held", gathered_stage_key(profile, stage), trained, _traits(strategy), sync, later)
    return profile.memo.once(key, lambda: held_at_segments(profile, strategy, stage, sync, trained, later=later))


def _left(profile: Profile, strategy: Strategy, stage: Stage, left: Left) -> StageMemory:
    """Return `held_between_passes` of a stage, cached for all stages that are equal up to their position."""
    key = ("left", gathered_stage_key(profile, stage), strategy.fsdp, left)
    return profile.memo.once(key, lambda: held_between_passes(profile, strategy.fsdp, stage, left))


def _traits(strategy: Strategy) -> tuple[object, ...]:
    """Return the cache key of a strategy: the options that decide what `fully_shard` holds of a stage."""
    return strategy.runs_module, strategy.fsdp, strategy.summing > strategy.fsdp, strategy.reduce


def _beside(gradients: tuple[int, int], activations: int, temporary: int) -> tuple[int, int, int]:
    """Combine (gradients, their buckets) with the rest to (gradients, activations, temporary including buckets)."""
    return gradients[0], activations, temporary + gradients[1]


def _saved(profile: Profile, stage: Stage, *, products: bool) -> int:
    """Return the bytes saved of one microbatch between its forward and its backward pass through a stage.

    A recomputed block saves its inputs and what is not computed again, see `_stays`.
    """
    inside = sum(profile.saved[block.end] - profile.saved[block.first] for block in stage.recomputed)
    stays = sum(_stays(profile, block, products=products) for block in stage.recomputed)
    return max(0, stage.saved - inside) + sum(size for _, size in stage.handed) + stays


def _stays(profile: Profile, block: Block, *, products: bool) -> int:
    """Return the bytes that a recomputed block saves beside its inputs.

    They are gradients of a loss in pieces, and with `products` the results that selective recomputation keeps.
    """
    once = profile.once[block.end] - profile.once[block.first]
    return once + (profile.products[block.end] - profile.products[block.first] if products else 0)


def _moments(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int, int]]:
    """Return the Pareto-optimal moments of the backward pass, one per segment.

    Each is (activations of the microbatch, temporary, gradients completed so far) in bytes.
    """
    key = ("moments", stage.first, stage.end, stage.recomputed, products)
    return profile.memo.once(key, lambda: _pareto(_every_moment(profile, stage, products=products)))


def _every_moment(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int, int]]:
    """Return the moments of all segments, in the order of the backward pass; see `_moments`."""
    again = tuple((block.first, block.end) for block in stage.recomputed)  # independent of what is gathered
    key = ("every moment", stage.first, stage.end, again, products)
    return profile.memo.once(key, lambda: _all_moments(profile, stage, products=products))


def _all_moments(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int, int]]:
    complete = [0] * (len(profile.segments) + 1)
    for parameter in map(profile.parameters.__getitem__, profile.within(stage.first, stage.end)):
        if parameter.trained:
            complete[next(segment for segment in parameter.segments if segment >= stage.first)] += parameter.bytes
    boundary = stage.saved - (profile.saved[stage.end] - profile.saved[stage.first])
    stays = {block.end: _stays(profile, block, products=products) for block in stage.recomputed}
    dropped = {
        block.end: profile.saved[block.end] - profile.saved[block.first] - stays[block.end]
        for block in stage.recomputed
    }
    gone = list(accumulate((dropped.get(segment, 0) for segment in range(stage.end + 1)), initial=0))[1:]
    block_of = {segment: block for block in stage.recomputed for segment in range(block.first, block.end)}
    found, done = [], 0
    for segment in reversed(range(stage.first, stage.end)):
        layer = profile.segments[segment].layer
        start = block_of[segment].first if segment in block_of else segment
        handed = sum(size for until, size in stage.handed if until <= start)
        before = gone[start]  # activations of blocks that are not recomputed yet
        activations = boundary + handed + profile.saved[segment + 1] - profile.saved[stage.first] - before
        activations += _put_off(profile, segment + 1, stage.end)
        found.append((max(0, activations), max(layer.temporary_backward, layer.temporary_forward), done))
        done += complete[segment]
    return found


def _in_forward(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int]]:
    """Return (activations of the microbatch, temporary) in bytes as the forward pass ends each block of a stage."""
    saved = stage.saved - (profile.saved[stage.end] - profile.saved[stage.first])
    found = []
    for block in stage.blocks:
        handed = sum(size for until, size in stage.handed if until <= block.first)
        if block.recomputed:
            saved += _stays(profile, block, products=products)
        else:
            saved += profile.saved[block.end] - profile.saved[block.first]
        layers = (each.layer for each in profile.segments[block.first : block.end])
        found.append((max(0, saved) + handed, max((each.temporary_forward for each in layers), default=0)))
    return found


def _pareto(moments: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Drop moments that another one exceeds both in memory and in the gradients completed."""
    found: list[tuple[int, int, int]] = []
    most = -1
    for activations, temporary, done in sorted(moments, key=lambda m: (-m[2], -(m[0] + m[1]))):
        if activations + temporary > most:
            found.append((activations, temporary, done))
            most = activations + temporary
    return found


def _stored(profile: Profile, strategy: Strategy, worker: Worker) -> int:
    """Return the bytes of a worker's parameters, as its software stores them."""
    return round(worker.parameters * element_bytes(profile.runtime, profile.precision, strategy).weights / WIDE)


def _accumulated(profile: Profile, strategy: Strategy, worker: Worker) -> int:
    """Return the bytes of all gradients of a worker, as its software keeps them."""
    each = element_bytes(profile.runtime, profile.precision, strategy).gradients
    shards = strategy.summing if profile.runtime.sharded_gradients and not strategy.splits_parameters else 1
    return round(worker.trained * each / WIDE / shards)


def _gradients(
    profile: Profile, strategy: Strategy, worker: Worker, *, later: bool
) -> Callable[[int], tuple[int, int]]:
    """Return a function from the bytes of gradients completed to (gradients, buckets beside them) in bytes."""
    if profile.runtime.kernels or profile.runtime.own_gradients:  # in buffers of their own from the start
        kept = _accumulated(profile, strategy, worker), 0
        return lambda done: kept
    bucket = 0 if strategy.summing == 1 or strategy.ps else max(profile.largest, bucket_bytes(strategy.bucket))
    half = profile.half if strategy.reduce else 0.0
    if strategy.summing > 1 and strategy.runs_module and not strategy.ps:
        copies = worker.trained if strategy.microbatches > 1 else 0
        return lambda done: (worker.trained, copies + round(half * min(done, bucket)))
    return lambda done: (
        worker.trained if later else done,
        min(done, bucket, worker.trained) + round(half * min(done, worker.trained)),
    )
