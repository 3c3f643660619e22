"""Predict step time and memory of a strategy in closed form, from a profile.

It is fast enough for a search over thousands of strategies.

    step = passes of the busiest pipeline worker + bubble + exposed communication + optimizer + report

The report is the all-reduce of loss and gradient norm at the end of a step.

Implemented in: `segment_times` (kernels and tensor-parallel collectives of each segment), `stage_time` (passes of one
stage), `overlap` (communication behind compute), `worker_time` (passes of one worker), `pipeline` (bubbles), `memory`
(bytes). `predict.workers` says what each worker holds; `predict.timeline` simulates the same parts event by event.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective
from shardwise.errors import StrategyError
from shardwise.options import dtype_of
from shardwise.predict.closed_form.eight_bit import updated_alone
from shardwise.predict.closed_form.memory import memory_at, memory_of
from shardwise.predict.closed_form.offload import FIELDS, check_host, check_room, offloads, updated
from shardwise.predict.closed_form.pipeline import StageTime, pipeline_seconds, played
from shardwise.predict.closed_form.pipeline_links import slower_links
from shardwise.predict.closed_form.segment_times import SegmentTimes, half_rate, timed
from shardwise.predict.closed_form.served import check_servers, message_seconds, server_notes, server_seconds
from shardwise.predict.closed_form.stage_time import StageCosts
from shardwise.predict.closed_form.streamed import stream_seconds
from shardwise.predict.closed_form.worker_time import WorkerTime, table_of, work_of
from shardwise.predict.hardware.times import origins, slowed
from shardwise.predict.hardware.uncertainty import relative_error
from shardwise.predict.prediction import Memory, Prediction
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.holdings import Worker, parts_of
from shardwise.predict.workers.padding import padding_notes
from shardwise.predict.workers.small_kernels import step_kernels
from shardwise.splitting.schedule import FORWARD
from shardwise.strategy import Strategy

SHORT_TABLE = 256
"""Limit of stages x microbatches up to which a schedule is simulated pass by pass.

The formulas, used beyond it, are accurate if there are many passes.
"""


STALENESS = "each update uses the gradient at weights one step old; the last gradient of a training updates nothing"
"""Note on the staleness of a pipeline that does not wait for the end of a step."""


def predict(profile: Profile, strategy: Strategy, cluster: Cluster, batch_size: int = 0) -> Prediction:
    """Predict time and memory of one optimizer step.

    Args:
        profile: profile of the workload for the strategy's tp, sp, precision and microbatch size.
        strategy: strategy to predict.
        cluster: cluster to run on; it may have more devices than the strategy has workers.
        batch_size: global batch size in samples; 0 selects the workload's.

    Raises:
        StrategyError: The batch does not divide, the profile is for another strategy or kind of device, the strategy
            has too many stages, or its offloading does not fit into the host.
        RequestError: The cluster has no rate for the dtype, or no link between two workers.
    """
    costs = costs_of(profile, strategy, cluster, batch_size)
    return costs.prediction()


def costs_of(
    profile: Profile, strategy: Strategy, cluster: Cluster, batch_size: int = 0, device: Device | None = None
) -> Costs:
    """Build the costs that a prediction, and the timeline, are computed from.

    Stages are always cut for the slowest device of the cluster. Costs are computed for `device`, by default the slowest
    as well. If the strategy has `speeds` and the cluster several kinds of devices, each pipeline worker instead gets
    the slowest device that it has in any replica.

    Raises:
        StrategyError, RequestError: As in `predict`; also if the strategy has unequal shares.
    """
    size = batch_size or profile.batch_size
    strategy = strategy.for_batch(size)
    if strategy.shares:
        raise StrategyError(f"shares={strategy.shares}: replicas with unequal shares are predicted one by one")
    _check(profile, strategy, size)
    times = timed(profile, cluster, strategy)
    if profile.device != times.device.kind:
        raise StrategyError(
            f"the profile of {profile.name} is for a {profile.device}, {cluster.name} has {times.device.name}: "
            f"profile it for a {times.device.kind}"
        )
    check_host(strategy, cluster, times.device)
    parts = parts_of(profile, strategy, times.forward.each, slower_links(profile, strategy, cluster))
    if offloads(strategy, times.device):
        for worker in parts.workers:
            check_room(worker, profile.update.of(strategy).state_bytes, times.device)

    def on(times: SegmentTimes, by_pipeline_rank: Sequence[Costs] = ()) -> Costs:
        stages = StageCosts(profile, strategy, cluster, times, parts)
        check_servers(strategy, parts.workers[0], stages.calls)
        _check_tied(strategy, stages)
        return Costs(stages, size, by_pipeline_rank)

    def on_device(device: Device) -> Costs:
        return on(timed(profile, cluster, strategy, device))

    if device is not None:
        return on_device(device)
    several = strategy.speeds and not cluster.homogeneous
    by_pipeline_rank = (
        [on_device(slowest_at(strategy, cluster, pipeline_rank)) for pipeline_rank in range(strategy.pp)]
        if several
        else []
    )
    return on(times, by_pipeline_rank)


def _check_tied(strategy: Strategy, stages: StageCosts) -> None:
    """Raise StrategyError if stages would have to sum gradients in each step that do not wait for each other."""
    if strategy.delayed and any(each.axis == "pp" for w in stages.parts.workers for each in stages.program.sums(w)):
        raise StrategyError(
            f"schedule={strategy.schedule}: a parameter is used in several stages, which would wait for each other's "
            "gradients of it in every step: use schedule=1f1b"
        )


def slowest_at(strategy: Strategy, cluster: Cluster, pipeline_rank: int) -> Device:
    """Return the slowest device of pipeline worker `pipeline_rank` in any replica, the one that all others wait for."""
    ranks = (
        strategy.rank(dp=row, fsdp=column, pp=pipeline_rank, tp=shard)
        for row in range(strategy.dp)
        for column in range(strategy.fsdp)
        for shard in range(strategy.tp)
    )
    return min(map(cluster.device, ranks), key=lambda device: max(device.flops.values(), default=0.0))


def _check(profile: Profile, strategy: Strategy, size: int) -> None:
    if not profile.cut and not strategy.runs_module:
        raise StrategyError(
            f"{profile.name} cannot be traced, so that {strategy} is not possible: use dp or fsdp alone"
        )
    samples = size // strategy.replicas // strategy.microbatches
    again = strategy.gathers_again if profile.gathers_again is None else profile.gathers_again
    wanted = strategy.tp, strategy.sp, samples, *strategy.kernel_options
    given = profile.tp, profile.sp, profile.microbatch, profile.split, profile.compiled, profile.loss_pieces, again
    precise = not strategy.precision or strategy.precision == profile.precision
    if wanted != given or not precise:
        raise StrategyError(
            f"the profile of {profile.name} in {profile.precision} has (tp, sp, microbatch, split, compiled, "
            f"loss_pieces, gathers again)={given}, strategy {strategy} with batch_size={size} needs {wanted}"
            + (f" in {strategy.precision}" if strategy.precision else "")
        )


@dataclass(frozen=True, slots=True)
class Epilogue:
    """Seconds of a worker's step beside its passes.

    Attributes:
        start: all-reduce of the batch's weight, before the first forward pass.
        reduce: all-reduces of gradients over tp, over pipeline workers that share parameters, and over replicas for
            parameters that several stages of the worker use.
        update: optimizer, gradient norm and clipping; that of the busiest server with parameter servers.
        exchange: broadcasts of updated parameters between replicas (zero=1), or messages to and from servers.
        report: all-reduce of losses and norms over all workers.
        host: fixed host time per step.
        hideable: part of the report that may run beside the update, if nothing waits for the norm.
        averages: seconds of the message of each fragment that local steps average.
        averaging: copies, and steps of an outer optimizer, that come with averages of all fragments.
    """

    start: float
    reduce: float
    update: float
    exchange: float
    report: float
    host: float
    hideable: float
    averages: tuple[float, ...] = ()
    averaging: float = 0.0


@dataclass(frozen=True, slots=True)
class _ComputedStep:
    """The computed step: per-worker work and epilogue, step time, exposed time of the loss all-reduce (seconds).

    `average` is the exposed time of averages after local steps: the mean over `local` steps.
    """

    works: list[WorkerTime]
    finishes: list[Epilogue]
    seconds: float
    report: float
    average: float


def unhidden(seconds: float, beside: float, overlap: float) -> float:
    """Return by how much communication of `seconds` lengthens steps of which `beside` seconds may hide it."""
    hidden = min(seconds, beside)
    return seconds - hidden + slowed(hidden, overlap)


class Costs:
    """Times and bytes of one strategy on one device, from which `predict` computes the step.

    Args:
        stages: times of the passes.
        batch_size: global batch size in samples.
        by_pipeline_rank: costs of each pipeline worker if they have different devices; empty if all have this device.
    """

    def __init__(self, stages: StageCosts, batch_size: int, by_pipeline_rank: Sequence[Costs] = ()) -> None:
        self.stages, self.calls, self.times, self.parts = stages, stages.calls, stages.times, stages.parts
        self.profile, self.strategy, self.cluster = stages.profile, stages.strategy, stages.cluster
        self.batch_size = batch_size
        self._by_pipeline_rank = tuple(by_pipeline_rank)

    def at(self, worker: Worker) -> Costs:
        """Return the costs on the device of a pipeline worker."""
        return self._by_pipeline_rank[worker.pipeline_rank] if self._by_pipeline_rank else self

    # ---- after the passes -------------------------------------------------------------------------------------------

    def finish(self, worker: Worker) -> Epilogue:
        """Compute the seconds that a worker needs after its last backward pass."""
        program = self.stages.program
        host = self.times.overhead("step").launching + self.times.crowding
        return Epilogue(
            start=self._seconds(program.start(worker)),
            reduce=self._seconds(program.sums(worker)),
            update=self.update(worker),
            exchange=self._exchange(worker),
            report=self._seconds(program.report(worker)),
            host=host,
            hideable=0.0 if self.waits_for_report else self._seconds(program.report(worker)[-1:]),
            averages=tuple(map(self._seconds, program.averages(worker))),
            averaging=self._averaging(worker),
        )

    def _averaging(self, worker: Worker) -> float:
        """Compute the seconds in which a worker packs and unpacks averages, and takes steps of an outer optimizer."""
        strategy, size = self.strategy, sum(map(sum, worker.averaged))
        if not strategy.local:
            return 0.0
        tensors = self._held(worker)[1]
        moved = 2 * size + (2 * size if strategy.delay else 0)  # into the message, and what was sent
        spent = self.calls.moved(size / 4, moved, strategy.fragments) + self.calls.moved(size / 4, 2 * size, 1)
        out = 2 + (4 if strategy.delay else 0) + (12 if strategy.outer == "nesterov" else 0)
        return (spent + self.calls.moved(size / 4, out * size, tensors)).total

    def average_exposed(self, finish: Epilogue, step: float) -> float:
        """Compute the seconds per step for which a worker waits for averages and what comes with them, as a mean.

        Args:
            finish: what the worker does after its passes.
            step: seconds of a step without averages, which hide them for `delay` steps.
        """
        if not self.strategy.local:
            return 0.0
        beside = self.strategy.delay * step
        exposed = sum(unhidden(seconds, beside, self.stages.overlap) for seconds in finish.averages)
        return (exposed + finish.averaging) / self.strategy.local

    def _seconds(self, collectives: Sequence[Collective]) -> float:
        return sum(count * self.calls.of(each) for each, count in Counter(collectives).items())

    def update(self, worker: Worker) -> float:
        """Compute the seconds of the optimizer, gradient norm and clipping included."""
        if self.strategy.ps:
            return server_seconds(self.calls, self.profile, self.strategy, worker)
        elements, tensors = worker.updated
        update = self.profile.update.of(self.strategy)
        if offloads(self.strategy, self.times.device):
            moved = sum(kernel.bytes for kernel in update.kernels) + (12 if self.profile.clipped else 0)
            return updated(moved * elements, self.times.device)
        if update.one_by_one:
            tensors = updated_alone(self.profile, self.strategy, worker)[1]
        kernels = 1 if update.at_once(self.times.device.kind) else tensors
        spent = self.calls.small(step_kernels(self.profile, self.strategy))
        for kernel in update.kernels:
            spent += self.calls.moved(elements, kernel.bytes * elements, kernels)
        if self.strategy.delayed:  # the weights of the next version
            spent += self.calls.moved(elements, 8 * elements, tensors)
        if self.profile.clipped:
            gradients = self._held(worker)[0] if worker.broadcast else elements
            spent += self.calls.moved(gradients, 4 * gradients, 1)  # the norm
            spent += self.calls.moved(gradients, 8 * gradients, 1)  # scaling
        return spent.total

    def _held(self, worker: Worker) -> tuple[int, int]:
        """Return (elements, tensors) of the trained parameters that a worker holds, before any sharding."""
        trained = [self.stages.trained(stage) for stage in worker.stages]
        return sum(elements for elements, _, _ in trained), sum(count for _, _, count in trained)

    def _exchange(self, worker: Worker) -> float:
        """Compute the seconds in which replicas give each other updated parameters (zero=1).

        Broadcasts come with copies into and out of their messages. Gathers may hide behind the next forward pass.
        """
        if self.strategy.ps:
            served = self.stages.program.served(worker)
            ways = served[: self.strategy.ps], served[self.strategy.ps :]
            return sum(message_seconds(self.calls, way, self.strategy.workers) for way in ways)
        seconds = self._seconds(self.stages.program.updated(worker))
        if worker.broadcast:
            size, messages = sum(worker.broadcast), len(worker.broadcast)
            copied = self.calls.moved(size / 4, 2 * size, messages)
            copied += self.calls.moved(size / 4, 2 * size, self._held(worker)[1])
            return seconds + copied.total
        if not self.profile.runtime.overlap_parameters:
            return seconds
        hidden = min(seconds, sum(self.stages.spent(stage, FORWARD).device for stage in worker.stages))
        return unhidden(seconds, hidden, self.stages.overlap)

    # ---- the step ---------------------------------------------------------------------------------------------------

    @cached_property
    def _played(self) -> _ComputedStep:
        works = [work_of(self.at(worker).stages, worker) for worker in self.parts.workers]
        finishes = [self.at(worker).finish(worker) for worker in self.parts.workers]
        if self.strategy.delayed:  # the report runs beside the passes of the next step
            updates = [finish.reduce + finish.update + finish.exchange + finish.host for finish in finishes]
            tables = [table_of(self.at(worker).stages, worker) for worker in self.parts.workers]
            seconds = stream_seconds(tables, updates, self.stages.messages)
            return _ComputedStep(works, finishes, seconds, 0.0, 0.0)
        ends = self._ends(works)
        start = max(finish.start for finish in finishes)
        last = start + max(
            end + f.reduce + f.update + f.exchange + f.host for end, f in zip(ends, finishes, strict=True)
        )
        report = max(finish.report for finish in finishes)
        hideable = max(finish.hideable for finish in finishes)
        hidden = min(hideable, max(finish.update for finish in finishes))
        step = start + last + report - hidden
        average = max(self.at(w).average_exposed(f, step) for w, f in zip(self.parts.workers, finishes, strict=True))
        return _ComputedStep(works, finishes, step + average, report - hidden, average)

    @property
    def step_seconds(self) -> float:
        """Return the seconds of one optimizer step; cheaper than `prediction`, which also computes memory."""
        return self._played.seconds

    def prediction(self) -> Prediction:
        """Return the prediction of the step; times are those of the busiest pipeline worker."""
        played = self._played
        works, finishes, step, report = played.works, played.finishes, played.seconds, played.report
        index = max(range(len(works)), key=lambda number: works[number].seconds)
        work, finish = works[index], finishes[index]
        exposed = work.exposed + work.spent.exchanges + finish.start + finish.reduce + finish.exchange + report
        exposed += played.average
        averages = sum(finish.averages) / self.strategy.local if self.strategy.local else 0.0
        host = work.host + finish.host
        busy = work.spent.kernels + work.slowed + host
        bubble = max(0.0, step - busy - exposed - finish.update)
        communication = work.communication + work.spent.exchanges + work.messages
        communication += finish.start + finish.reduce + finish.exchange + finish.report + averages
        return Prediction(
            step_seconds=step,
            compute_seconds=work.spent.kernels + work.slowed,
            communication_seconds=communication,
            exposed_communication_seconds=exposed,
            bubble_seconds=bubble,
            optimizer_seconds=finish.update,
            host_seconds=host,
            **self.facts(min(1.0, exposed / step)),
            terms={
                "forward": work.forward,
                "backward": work.backward,
                "tensor exchanges": work.spent.exchanges,
                "gathers, reductions, buckets": work.communication,
                "messages": work.messages,
                "weight of the batch": finish.start,
                "gradient sums": finish.reduce,
                "parameter exchange": finish.exchange,
                "report": finish.report,
                **({"averages of local steps": averages} if self.strategy.local else {}),
            },
        )

    def facts(self, communicating: float = 0.0) -> dict[str, Any]:
        """Return the fields of a prediction that do not depend on how its times are found.

        Args:
            communicating: share of the step for which the device waits for communication.
        """
        device, workers, precision = self.times.device, self.strategy.workers, self.profile.precision
        return {
            "memory": self.memory,
            "memory_available": self.memory_available,
            "margin": self.cluster.margin,
            "model_flops": self.model_flops,
            "precision": precision,
            "peak_flops": workers * device.flops.get(dtype_of(precision), 0.0),
            "half_peak_flops": workers * half_rate(device),
            "error": relative_error(self.cluster, device, self.strategy, communicating),
            "samples": self.batch_size,
            "origins": self.origins,
            "notes": (
                *padding_notes(self.profile, self.strategy),
                *server_notes(self.profile, self.strategy, self.parts.workers[0]),
                *((STALENESS,) if self.strategy.delayed else ()),
            ),
        }

    @property
    def waits_for_report(self) -> bool:
        """Return whether clipping needs an all-reduce of the gradient norm, so that the update waits for the report.

        Replicas that take local steps clip by their own norm, and wait for the first sum of the report anyway.
        """
        strategy = self.strategy
        whole = strategy.runs_module and not strategy.splits_parameters
        return self.profile.clipped and not whole and not strategy.local

    @property
    def memory(self) -> Memory:
        """Return the peak memory of the device that needs most."""
        return memory_of(self.profile, self.strategy, self.parts, self.times.device)

    @property
    def memory_available(self) -> int:
        """Return the bytes that a worker of the strategy may need on the smallest device, less by the margin."""
        return self.cluster.least_memory(self.strategy.workers)

    def memory_at(self, worker: Worker) -> Memory:
        """Return the peak memory of a pipeline worker's device."""
        return memory_at(self.profile, self.strategy, worker, self.times.device)

    @property
    def least_memory(self) -> int:
        """Return a lower bound of the peak bytes: the larger of the first and the last pipeline worker."""
        return memory_of(self.profile, self.strategy, self.parts, self.times.device, ends=True).total

    @property
    def origins(self) -> dict[str, str]:
        """Return name -> origin of each input of the prediction: measured, datasheet, fitted or assumed."""
        found = origins(self.cluster, self.times.device)
        offloaded = offloads(self.strategy, self.times.device)
        return {name: origin for name, origin in found.items() if offloaded or name not in FIELDS}

    @property
    def model_flops(self) -> float:
        """Return the FLOPs of the step on all devices together, without recomputation."""
        return self.profile.flops * self.strategy.microbatches * self.strategy.replicas * self.strategy.tp

    def _ends(self, works: list[WorkerTime]) -> list[float]:
        """Return the time, in seconds, at which each worker has finished its last backward pass."""
        strategy = self.strategy
        if strategy.pp == 1:
            return [work.seconds for work in works]
        if strategy.pp * strategy.stages_per_worker * strategy.microbatches <= SHORT_TABLE:
            return played(
                [table_of(self.at(worker).stages, worker) for worker in self.parts.workers], self.stages.messages
            )
        stages = [time for _, time in sorted((n, t) for work in works for n, t in work.times.items())]
        whole = pipeline_seconds(strategy.schedule, stages, strategy.pp, strategy.microbatches)
        whole += sum(sum(work.heads.values()) for work in works)
        tails = [sum(work.tails.values()) for work in works]
        ends, drained = [], 0.0
        for index, work in enumerate(works):
            tail = sum(tails[index:]) if strategy.splits_parameters else tails[index]
            ends.append(max(whole - drained, work.seconds - tails[index]) + tail)
            drained += stages[index].backward + (stages[index + 1].returns if index + 1 < len(stages) else 0.0)
        return _after_hosts(ends, stages, [0.0 if work.spent.inline else work.spent.launching for work in works])


def _after_hosts(ends: Sequence[float], stages: Sequence[StageTime], launching: Sequence[float]) -> list[float]:
    """Delay the ends of workers whose hosts launch more slowly than their devices compute.

    The last backward pass of a worker also follows the end of the worker behind it, which sends it the last gradients.
    """
    found: list[float] = []
    for index in reversed(range(len(ends))):
        hosts = launching[index]
        if found:
            hosts = max(hosts, found[-1] + stages[index + 1].returns + stages[index].backward)
        found.append(max(ends[index], hosts))
    return found[::-1]
