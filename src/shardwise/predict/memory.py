"""Peak bytes of one device, by what they are for: tensors, not what kernels use inside.

The peak is looked for where it can be: at each link of a backward pass, with the microbatches that are under way, and
in the optimizer.

    parameters    what stays here, and what `fully_shard` has gathered
    gradients     of what stays here; whole from the start where buckets or earlier microbatches hold them
    optimizer     its state; like parameters and gradients without what lies on the host (`offload`)
    activations   kept for the backward passes of all microbatches under way (Korthikanti et al. 2022, section 4)
    temporary     what passes, buckets and the optimizer need for a moment
    process       of a CPU that was measured: the worker's process without tensors, and what its allocator leaves unused
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import TYPE_CHECKING

from shardwise.cluster.cluster import Device
from shardwise.predict.alike import alike, gathered_alike
from shardwise.predict.gpu import ELEMENT_BYTES
from shardwise.predict.issuing import Counts, under_way
from shardwise.predict.kernel import Kernel
from shardwise.predict.offload import left, offloads
from shardwise.predict.parts import Block, Stage, Worker
from shardwise.predict.prediction import Memory
from shardwise.predict.profile import Link, Profile
from shardwise.predict.sharded import Held, held_at_links, keeps_gradients
from shardwise.strategy import Strategy

if TYPE_CHECKING:
    from shardwise.predict.costs import Costs


def memory_of(costs: Costs, *, ends: bool = False) -> Memory:
    """Of the pipeline worker that needs most; `ends`: of the first and the last one, which is quicker to know."""
    workers = costs.parts.workers
    if ends and len(workers) > 1:
        workers = workers[:: len(workers) - 1]
    return _in_process(max((worker_memory(costs, worker) for worker in workers), key=lambda each: each.total), costs)


def memory_at(costs: Costs, worker: Worker) -> Memory:
    """Of one pipeline worker, with its process."""
    return _in_process(worker_memory(costs, worker), costs)


def _in_process(memory: Memory, costs: Costs) -> Memory:
    return replace(memory, process=_process(memory, costs.times.device, costs.strategy))


def _process(memory: Memory, device: Device, strategy: Strategy) -> int:
    """What a worker's process needs beside its tensors, where that was measured (`cluster.Device`)."""
    kind = "graph" if strategy.tp > 1 or strategy.pp > 1 else "sharded" if strategy.splits_parameters else "module"
    own = device.process.get(kind, device.process.get("module", 0))
    if kind == "graph" and strategy.splits_parameters:
        own += max(0, device.process.get("sharded", 0) - device.process.get("module", 0))
    return own + round((device.heap - 1.0) * (memory.activations + memory.temporary))


def worker_memory(costs: Costs, worker: Worker) -> Memory:
    """The tensors of one pipeline worker, the first of its tensor-parallel workers in the first replica."""
    profile, strategy = costs.profile, costs.strategy
    offloaded = offloads(strategy, costs.times.device)
    if offloaded:
        worker = left(worker)
    elements, tensors = worker.updated
    update = profile.update
    state = round(elements * update.state_bytes)
    at_once = update.at_once("cpu" if offloaded else costs.times.device.kind)
    one = min(profile.largest, worker.trained) if tensors else 0
    updating = Memory(
        parameters=worker.parameters,
        gradients=worker.trained,
        optimizer=state,
        activations=0,
        temporary=round(elements * update.temporary_bytes) if at_once else one,
    )
    return max(
        (updating, _passing(profile, strategy, worker, state, offloaded=offloaded)), key=lambda memory: memory.total
    )


def _passing(profile: Profile, strategy: Strategy, worker: Worker, state: int, *, offloaded: bool) -> Memory:
    """At the peak of a backward pass: of the first one, or of a later one, which finds gradients."""
    stages = {stage.number: stage for stage in worker.stages}
    products = strategy.keeps_products
    kept = {number: _kept(profile, stage, products=products) for number, stage in stages.items()}
    module = strategy.tp == strategy.pp == 1
    batches = profile.batch_bytes * (1 if module else strategy.microbatches)  # those of a pipeline come all at once
    found: list[Memory] = []
    for counts, later in _passes(strategy, worker.place):
        every = sum(count * kept[number] for number, count, _ in counts)
        every += sum(count * _put_off(profile, stages[number].first, stages[number].end) for number, _, count in counts)
        for number in (number for number, count, _ in counts if count):
            stage = stages[number]
            peak = _peak(profile, strategy, worker, stage, later=later, offloaded=offloaded)
            found.append(
                Memory(
                    parameters=worker.parameters + peak.gathered,
                    gradients=peak.gradients,
                    optimizer=state,
                    activations=every - kept[number] + peak.activations + stage.received,
                    temporary=peak.temporary + batches,
                )
            )
    return max(found, key=lambda memory: memory.total)


def _passes(strategy: Strategy, place: int) -> list[tuple[Counts, bool]]:
    """(what is under way, whether gradients are there) of the backward passes with most of it."""
    if strategy.tp == strategy.pp == 1:
        return [(((0, 1, 0),), strategy.microbatches > 1)]
    first, later = under_way(strategy, place)
    return [(each, gradients) for each, gradients in ((first, False), (later, True)) if each]


def _put_off(profile: Profile, first: int, end: int) -> int:
    """Bytes that gradients of the weights of these links need: what was multiplied with them, and its gradient."""
    if not profile.split:
        return 0
    sums = profile.kept.once(("put off",), lambda: tuple(accumulate(map(_operands, profile.links), initial=0)))
    return sums[end] - sums[first]


def _operands(link: Link) -> int:
    kernels = [kernel for kernel in link.layer.weights.kernels if kernel.kind in ("matmul", "convolution")]
    return round(sum(kernel.count * (kernel.bytes - _result(kernel)) for kernel in kernels))


def _result(kernel: Kernel) -> float:
    """Bytes that a product of matrices writes."""
    return math.prod(kernel.shape[:3]) * ELEMENT_BYTES[kernel.dtype] if kernel.kind == "matmul" else 0.0


@dataclass(frozen=True, slots=True)
class _Peak:
    """Bytes at the peak of one backward pass of a stage; activations are those of its microbatch."""

    gathered: int
    gradients: int
    activations: int
    temporary: int

    @property
    def total(self) -> int:
        return self.gathered + self.gradients + self.activations + self.temporary


def _peak(profile: Profile, strategy: Strategy, worker: Worker, stage: Stage, *, later: bool, offloaded: bool) -> _Peak:
    products = strategy.keeps_products
    if not strategy.splits_parameters:
        gradients_at = _gradients(strategy, worker, later=later)
        moments = _moments(profile, stage, products=products)
        peaks = [_Peak(0, *_beside(gradients_at(done), each, temporary)) for each, temporary, done in moments]
        return max(peaks, key=lambda peak: peak.total)
    trained = 0 if keeps_gradients(strategy) else worker.trained  # whole ones there, whatever the worker's slices are
    own = (alike(profile, stage), trained, _traits(strategy), strategy.keeps_products, later, offloaded)

    def highest() -> _Peak:
        held = _held(profile, strategy, stage, trained, later=later)
        moments = _every_moment(profile, stage, products=products)
        peaks = (
            _Peak(each.gathered, 0 if offloaded else each.slices, activations, temporary + each.whole)
            for each, (activations, temporary, _) in zip(held, moments, strict=True)
        )
        return max(peaks, key=lambda peak: peak.total)

    return profile.kept.once(("sharded peak", *own), highest)


def _held(profile: Profile, strategy: Strategy, stage: Stage, trained: int, *, later: bool) -> list[Held]:
    """See `held_at_links`; kept for stages that are alike."""
    key = ("held", gathered_alike(profile, stage), trained, _traits(strategy), later)
    return profile.kept.once(key, lambda: held_at_links(profile, strategy, stage, trained, later=later))


def _traits(strategy: Strategy) -> tuple[object, ...]:
    """What of a strategy decides what `fully_shard` holds of a stage."""
    module = strategy.tp == strategy.pp == 1
    return module, strategy.fsdp, strategy.zero, strategy.microbatches > 1, strategy.schedule


def _beside(gradients: tuple[int, int], activations: int, temporary: int) -> tuple[int, int, int]:
    """(gradients, activations, temporary with the buckets of gradients)."""
    return gradients[0], activations, temporary + gradients[1]


def _kept(profile: Profile, stage: Stage, *, products: bool) -> int:
    """What is kept of a microbatch: of blocks that are computed again their inputs, and results of `products`."""
    inside = sum(profile.saved[block.end] - profile.saved[block.first] for block in stage.recomputed)
    stays = sum(_products(profile, block) for block in stage.recomputed) if products else 0
    return max(0, stage.kept - inside) + sum(size for _, size in stage.handed) + stays


def _products(profile: Profile, block: Block) -> int:
    return profile.products[block.end] - profile.products[block.first]


def _moments(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int, int]]:
    """(activations of the microbatch, temporary, bytes of gradients that are there) when each link goes backwards."""
    key = ("moments", stage.first, stage.end, stage.recomputed, products)
    return profile.kept.once(key, lambda: _pareto(_every_moment(profile, stage, products=products)))


def _every_moment(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int, int]]:
    """Also those that another one exceeds in all, in the order of the backward pass."""
    again = tuple((block.first, block.end) for block in stage.recomputed)  # whatever is gathered of them
    key = ("every moment", stage.first, stage.end, again, products)
    return profile.kept.once(key, lambda: _all_moments(profile, stage, products=products))


def _all_moments(profile: Profile, stage: Stage, *, products: bool) -> list[tuple[int, int, int]]:
    complete = [0] * (len(profile.links) + 1)
    for parameter in map(profile.parameters.__getitem__, profile.within(stage.first, stage.end)):
        if parameter.trained:
            complete[next(link for link in parameter.links if link >= stage.first)] += parameter.bytes
    boundary = stage.kept - (profile.saved[stage.end] - profile.saved[stage.first])
    stays = {block.end: _products(profile, block) if products else 0 for block in stage.recomputed}
    dropped = {
        block.end: profile.saved[block.end] - profile.saved[block.first] - stays[block.end]
        for block in stage.recomputed
    }
    gone = list(accumulate((dropped.get(link, 0) for link in range(stage.end + 1)), initial=0))[1:]
    block_of = {link: block for block in stage.recomputed for link in range(block.first, block.end)}
    found, done = [], 0
    for link in reversed(range(stage.first, stage.end)):
        layer = profile.links[link].layer
        start = block_of[link].first if link in block_of else link
        handed = sum(size for until, size in stage.handed if until <= start)
        before = gone[start]  # of blocks that are not computed again yet
        activations = boundary + handed + profile.saved[link + 1] - profile.saved[stage.first] - before
        activations += _put_off(profile, link + 1, stage.end)
        found.append((max(0, activations), max(layer.temporary_backward, layer.temporary_forward), done))
        done += complete[link]
    return found


def _pareto(moments: Sequence[tuple[int, int, int]]) -> list[tuple[int, int, int]]:
    """Without those that another one exceeds in all."""
    found: list[tuple[int, int, int]] = []
    most = -1
    for activations, temporary, done in sorted(moments, key=lambda m: (-m[2], -(m[0] + m[1]))):
        if activations + temporary > most:
            found.append((activations, temporary, done))
            most = activations + temporary
    return found


def _gradients(strategy: Strategy, worker: Worker, *, later: bool) -> Callable[[int], tuple[int, int]]:
    """(gradients, buckets beside them) by the bytes of gradients that a backward pass has completed."""
    if strategy.replicas > 1 and strategy.tp == strategy.pp == 1:
        copies = worker.trained, worker.trained if strategy.microbatches > 1 else 0
        return lambda done: copies
    alone = strategy.replicas == 1
    return lambda done: (worker.trained if later else done, 0 if alone else min(done, worker.trained))
