"""What a strategy costs, in closed form: from a profile, in the time that a search over thousands of strategies has.

    step = passes of the busiest pipeline worker + bubble + what it waits for others + optimizer + report

Implemented in: `timing` (kernels and exchanges of each link), `parts` (who holds what), `passes` (what is hidden behind
compute), `work` (the passes of a worker), `pipelines` (bubbles), `memory` (bytes), `issuing` (messages). `timeline`
plays the same parts as events.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective, Group
from shardwise.errors import StrategyError
from shardwise.parallel.schedule import BACKWARD, FORWARD, INPUT, WEIGHT
from shardwise.predict.alike import alike
from shardwise.predict.hops import slower_hops, workers_at_once
from shardwise.predict.issuing import Sync
from shardwise.predict.kernel import Kernel
from shardwise.predict.kernels import collective_seconds, origins
from shardwise.predict.memory import memory_of
from shardwise.predict.network import level_of
from shardwise.predict.offload import FIELDS, check_host, check_room, fetched, offloads, updated
from shardwise.predict.parts import (
    REPORT_BYTES,
    Gathered,
    Parts,
    Stage,
    Worker,
    group_of,
    message_group,
    parts_of,
)
from shardwise.predict.passes import Passed, Piece, bucketed, gathered, slowed
from shardwise.predict.pipelines import Messages, StageTime, pipeline_seconds, played
from shardwise.predict.prediction import Memory, Prediction
from shardwise.predict.profile import Profile
from shardwise.predict.timing import DTYPES, Spent, Timed, timed
from shardwise.predict.work import Work, table_of, work_of
from shardwise.strategy import Strategy

SHORT_TABLE = 256
"""Microbatches on stages up to which the table of a schedule is played; the formulas are good where there are many."""


def predict(profile: Profile, strategy: Strategy, cluster: Cluster, batch_size: int = 0) -> Prediction:
    """What one optimizer step costs.

    Args:
        profile: of the workload, for the strategy's tp, sp, precision and size of microbatch.
        strategy: how to split it.
        cluster: on what; it may have more devices than the strategy has workers.
        batch_size: global; the workload's if left out.

    Raises:
        StrategyError: the batch does not divide, the profile is for another strategy, or it has too many stages.
        RequestError: the cluster has no rate for the dtype, or no link between workers.
    """
    costs = costs_of(profile, strategy, cluster, batch_size)
    return costs.prediction()


def costs_of(
    profile: Profile, strategy: Strategy, cluster: Cluster, batch_size: int = 0, device: Device | None = None
) -> Costs:
    """The parts of a prediction, which the timeline is made of too. Raises as `predict` does.

    They are for `device` of the cluster, or else for the slowest, for which stages are cut in any case; where workers
    of a pipeline have `speeds` of their own, each is for the slowest device that it has in any replica.
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
    parts = parts_of(profile, strategy, times.forward.each, slower_hops(profile, strategy, cluster))
    if offloads(strategy, times.device):
        for worker in parts.workers:
            check_room(worker, profile.update.state_bytes, times.device)

    def on(device: Device) -> Costs:
        return Costs(profile, strategy, cluster, timed(profile, cluster, strategy, device), parts, size)

    if device is not None:
        return on(device)
    places = [on(slowest_at(strategy, cluster, place)) for place in range(strategy.pp)] if strategy.speeds else []
    return Costs(profile, strategy, cluster, times, parts, size, places)


def slowest_at(strategy: Strategy, cluster: Cluster, place: int) -> Device:
    """What the worker at a place of the pipeline computes on; of all replicas that which the others wait for."""
    ranks = (
        strategy.rank(dp=row, fsdp=column, pp=place, tp=shard)
        for row in range(strategy.dp)
        for column in range(strategy.fsdp)
        for shard in range(strategy.tp)
    )
    return min(map(cluster.device, ranks), key=lambda device: max(device.flops.values(), default=0.0))


def _check(profile: Profile, strategy: Strategy, size: int) -> None:
    if not profile.cut and (strategy.tp > 1 or strategy.pp > 1):
        raise StrategyError(f"{profile.name} cannot be traced, so that tp and pp are not possible: use dp or fsdp")
    samples = size // strategy.replicas // strategy.microbatches
    wanted = strategy.tp, strategy.sp, samples, strategy.schedule == "zero-bubble"
    given = profile.tp, profile.sp, profile.microbatch, profile.split
    precise = not strategy.precision or strategy.precision == profile.precision
    if wanted != given or not precise:
        raise StrategyError(
            f"the profile of {profile.name} is for (tp, sp, microbatch, split)={given} in {profile.precision}, "
            f"strategy {strategy} with batch_size={size} needs {wanted}"
            + (f" in {strategy.precision}" if strategy.precision else "")
        )


@dataclass(frozen=True, slots=True)
class Finish:
    """What a worker does after its last backward pass.

    Attributes:
        reduce: sums of gradients over tp and over pipeline workers that share parameters.
        update: the optimizer, norms and clipping.
        exchange: what replicas send each other of what they updated.
        report: losses, which all workers add up.
        host: what the host needs for every step, beside all of this.
    """

    reduce: float
    update: float
    exchange: float
    report: float
    host: float


@dataclass(frozen=True, slots=True)
class _Step:
    """Of all pipeline workers their passes and what comes after, the seconds of the step, what of the report shows."""

    works: list[Work]
    finishes: list[Finish]
    seconds: float
    report: float


class Costs:
    """The times of one strategy's parts; see `predict`.

    Args:
        profile, strategy, cluster, times, parts, batch_size: what they are made of.
        places: of each pipeline worker, where these are on different devices; none: all are like this.
    """

    def __init__(
        self,
        profile: Profile,
        strategy: Strategy,
        cluster: Cluster,
        times: Timed,
        parts: Parts,
        batch_size: int,
        places: Sequence[Costs] = (),
    ) -> None:
        self._places = tuple(places)
        self.profile, self.strategy, self.cluster = profile, strategy, cluster
        self.times, self.parts, self.batch_size = times, parts, batch_size
        self.blocking = times.device.kind == "cpu"
        self.overlap = times.device.overlap
        self._passed: dict[object, Passed] = {}
        self._moved: dict[tuple[float, float, int], float] = {}
        self._grouped: dict[tuple[Gathered | None, bool, bool], tuple[float, float, float]] = {}
        self._fsdp, self._dp = group_of(strategy, "fsdp"), group_of(strategy, "dp")
        self.messages = self._between()

    def at(self, worker: Worker) -> Costs:
        """Those on the device of a pipeline worker."""
        return self._places[worker.place] if self._places else self

    def _between(self) -> Messages:
        found: dict[tuple[str, int], list[tuple[int, float]]] = {}
        pp = self.strategy.pp
        for number, stage in self.parts.stages.items():
            for kind, messages in ((FORWARD, stage.sent), (BACKWARD, stage.returned)):
                for target, sizes in messages:
                    if target % pp != number % pp:
                        seconds = self.message(number, target, sizes)
                        found.setdefault((kind, target), []).append((number, seconds))
        return found

    def waits(self, kind: str, stage: int) -> float:
        """Seconds of the messages that a stage waits for before a forward (F), or a backward (B) pass."""
        return sum(seconds for _, seconds in self.messages.get((kind, stage), ()))

    # ---- one collective, one kernel ---------------------------------------------------------------------------------

    def collective(self, operation: str, size: int, group: Group, workers: int = 0) -> float:
        """Seconds; the same call costs nothing to ask for again. `workers` do the same at the same time; 0: all do."""
        if group.size <= 1:
            return 0.0
        crowd = (workers or self.strategy.workers) if self.cluster.collectives else 0
        key = ("collective", id(self.cluster), operation, size, group, crowd)
        collective = Collective(operation, size, group)
        return self.profile.kept.once(key, lambda: collective_seconds(collective, self.cluster, crowd), self.cluster)

    def moved(self, elements: float, size: float, count: int) -> float:
        """Seconds of `count` kernels that move `size` bytes of `elements` elements in all."""
        if count < 1 or elements < 1:
            return 0.0
        key = elements, size, count
        if key not in self._moved:
            self._moved[key] = self._copied(elements, size, count)
        return self._moved[key]

    def _copied(self, elements: float, size: float, count: int) -> float:
        kernel = Kernel("copy", "memory", "float32", 0.0, size / count, (max(1, round(elements / count)),), count=count)
        return self.times.kernel(kernel)

    # ---- passes -----------------------------------------------------------------------------------------------------

    def spent(self, stage: Stage, kind: str) -> Spent:
        """What a stage computes of one microbatch; norms over replicas and what is computed again with it."""
        times = self.times
        if kind == WEIGHT:
            return times.weights.between(stage.first, stage.end)
        forward = kind == FORWARD
        spent = (times.forward if forward else times.backward).between(stage.first, stage.end)
        if not forward and kind != INPUT and self.profile.split:
            spent += times.weights.between(stage.first, stage.end)
        if not forward:
            for block in stage.recomputed:
                spent += times.again(block.first, block.end, products=self.strategy.keeps_products)
        return spent + Spent(exchanges=self._norms(stage, forward))

    def _norms(self, stage: Stage, forward: bool) -> float:
        if self.strategy.replicas == 1 or not self.times.normalised:
            return 0.0
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        total = 0.0
        for link, channels in self.times.normalised:
            if not stage.first <= link < stage.end:
                continue
            gather = self.collective("all_gather", 4 * self.strategy.replicas * (2 * channels + 1), group)
            if forward:
                total += gather
            else:
                total += self.collective("all_reduce", 8 * channels, group)
                total += gather if any(block.first <= link < block.end for block in stage.recomputed) else 0.0
        return total

    def passed(self, stage: Stage, kind: str, sync: Sync | None, final: bool, first: bool) -> Passed:
        """One pass of one stage.

        Args:
            stage: which.
            kind: F, B, I or W.
            sync: what `fully_shard` does; None without it.
            final: whether gradients are complete after it.
            first: whether gradients are there for the first time; later they are added up.
        """
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        key = alike(self.profile, stage), kind, sync, final, first, self._like(group)
        if key not in self._passed:
            self._passed[key] = self._pass(stage, kind, sync, final, first)
        return self._passed[key]

    def _like(self, group: Group) -> Group:
        """The group that begins at rank 0, where its collectives take as long as this one's."""
        begins = replace(group, first=0)
        levels = self.cluster.levels
        alike = (
            not self.cluster.collectives and levels and level_of(begins, self.cluster) == level_of(group, self.cluster)
        )
        return begins if alike else group

    def _pass(self, stage: Stage, kind: str, sync: Sync | None, final: bool, first: bool) -> Passed:
        spent = self.computed(stage, kind, sync, final=final, first=first)
        if sync is not None and kind != WEIGHT:
            pieces, root = self.pieces(stage, kind, sync, spent)
            total, exposed = gathered(pieces, root, blocking=self.blocking)
            return Passed(spent, total, exposed, slowed(total - exposed, self.overlap))
        if final and stage.buckets and kind != WEIGHT:
            total, exposed = bucketed(self.buckets(stage, spent.device), spent.device)
            return Passed(spent, total, exposed, slowed(total - exposed, self.overlap))
        return Passed(spent)

    def computed(self, stage: Stage, kind: str, sync: Sync | None, *, final: bool, first: bool) -> Spent:
        """What one pass computes: `spent`, and what is done to gradients and gathered parameters; see `passed`."""
        spent = self.spent(stage, kind)
        if self.strategy.tp > 1 or self.strategy.pp > 1:
            spent += self.times.overhead("stage")
        if kind not in (FORWARD, INPUT):
            spent += Spent(kernels=self._gradients(stage, final=final, first=first))
        if sync is None or kind == WEIGHT:
            return spent
        copied = 0.0
        groups = Counter((block.gathered, sync.blocks) for block in stage.blocks) + Counter([(stage.root, sync.root)])
        for (group, gathers), count in groups.items():
            if group is not None:
                copied += count * self.moved(group.gather / 4, 2 * group.gather, 1) if gathers else 0.0
                copied += count * self.moved(group.reduce / 4, 2 * group.reduce, 1) if sync.reduces else 0.0
        watched = sum(n for (group, gathers), n in groups.items() if group is not None and (gathers or sync.reduces))
        return spent + Spent(kernels=copied) + self.times.overhead("sharded", watched)

    def buckets(self, stage: Stage, seconds: float) -> list[tuple[float, float]]:
        """(when it is complete, how long it takes) of each bucket of a backward pass of `seconds`."""
        times = self.times
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        whole = times.backward.total[stage.end] - times.backward.total[stage.first]
        stretch = seconds / whole if whole else 1.0
        end, total = times.backward.total[stage.end], times.backward.total
        takes = {size: self.collective("all_reduce", size, group) for size in {b.bytes for b in stage.buckets}}
        return [((end - total[bucket.ready]) * stretch, takes[bucket.bytes]) for bucket in stage.buckets]

    def _gradients(self, stage: Stage, *, final: bool, first: bool) -> float:
        """What is done to gradients beside computing them: added to those of earlier microbatches, put into buckets."""
        elements, size, count = self._trained(stage)
        seconds = 0.0 if first else self.moved(elements, 3 * size, count)
        if final and stage.buckets and not self.strategy.splits_parameters:
            copies = 1 if self.strategy.tp == self.strategy.pp == 1 else 2
            seconds += copies * self.moved(elements, 2 * size, count)
        return seconds

    def _trained(self, stage: Stage) -> tuple[int, int, int]:
        """Elements, bytes and number of the parameters of a stage that have a gradient."""

        def count() -> tuple[int, int, int]:
            own = [self.profile.parameters[index] for index in self.profile.within(stage.first, stage.end)]
            own = [parameter for parameter in own if parameter.trained]
            return sum(p.elements for p in own), sum(p.bytes for p in own), len(own)

        return self.profile.kept.once(("trained", stage.first, stage.end), count)

    def pieces(self, stage: Stage, kind: str, sync: Sync, spent: Spent) -> tuple[list[Piece], Piece]:
        """The parts of a pass between gathers, in the order in which they compute, and what belongs to all of them."""
        forward = kind == FORWARD
        sums = self.times.forward if forward else self.times.backward
        whole = sums.total[stage.end] - sums.total[stage.first]
        stretch = spent.device / whole if whole else 1.0
        found: list[Piece] = []
        at = stage.first
        for number, block in enumerate(stage.blocks):
            if block.first > at:
                found.append(Piece((sums.total[block.first] - sums.total[at]) * stretch))
            seconds = (sums.total[block.end] - sums.total[max(at, block.first)]) * stretch
            found.append(Piece(seconds, *self._group(block.gathered, sync.blocks, sync.reduces), f"block {number}"))
            at = max(at, block.end)
        if at < stage.end:
            found.append(Piece((sums.total[stage.end] - sums.total[at]) * stretch))
        root = Piece(0.0, *self._group(stage.root, sync.root, sync.reduces))
        return (found if forward else found[::-1]), root

    def _group(self, group: Gathered | None, gathers: bool, reduces: bool) -> tuple[float, float, float]:
        """Seconds of (gather, scatter, sum over dp)."""
        key = group, gathers, reduces
        if key not in self._grouped:
            self._grouped[key] = (0.0, 0.0, 0.0) if group is None else self._sharing(group, gathers, reduces)
        return self._grouped[key]

    def _sharing(self, group: Gathered, gathers: bool, reduces: bool) -> tuple[float, float, float]:
        gather = self.collective("all_gather", group.gather, self._fsdp) + self._fetched(group.gather) if gathers else 0
        if not reduces or not group.reduce:
            return gather, 0.0, 0.0
        mirror = self.collective("all_reduce", group.reduce // self.strategy.fsdp, self._dp)
        scatter = self.collective("reduce_scatter", group.reduce, self._fsdp) + self._fetched(group.reduce)
        return gather, scatter, mirror

    def _fetched(self, size: int) -> float:
        """Seconds in which this worker's slice of so many bytes comes from the host, or goes there."""
        device = self.times.device
        return fetched(size / self.strategy.fsdp, device) if offloads(self.strategy, device) else 0.0

    # ---- after the passes -------------------------------------------------------------------------------------------

    def finish(self, worker: Worker) -> Finish:
        """What a worker does after its last backward pass."""
        strategy = self.strategy
        replicas = group_of(strategy, "replicas", worker.place)
        reduce = sum(self.collective("all_reduce", bucket.bytes, replicas) for bucket in worker.twice)
        reduce += sum(seconds for _, _, seconds in self.sums_over_workers(worker))
        exchange = sum(self.collective("broadcast", size, replicas) for size in worker.broadcast)
        report = self.collective("all_reduce", REPORT_BYTES, group_of(strategy, "world"))
        if self.profile.weighted:
            report += self.collective("all_reduce", 8, replicas)
        host = self.times.overhead("step").launching + self.times.crowding
        return Finish(reduce, self.update(worker), exchange, report, host)

    def sums_over_workers(self, worker: Worker) -> list[tuple[tuple[int, ...], int, float]]:
        """(pipeline workers, bytes, seconds) of gradients that are added up after the last pass; none: over tp."""
        strategy = self.strategy
        tensor = group_of(strategy, "tp")
        found: list[tuple[tuple[int, ...], int, float]] = []
        if strategy.tp > 1:
            found += [((), size, self.collective("all_reduce", size, tensor)) for size in worker.summed]
        for workers, size in worker.tied:
            step = (workers[-1] - workers[0]) // max(len(workers) - 1, 1)
            group = Group(len(workers), step * strategy.stride("pp"), strategy.rank(pp=workers[0]))
            found.append((workers, size, self.collective("all_reduce", size, group)))
        return found

    def update(self, worker: Worker) -> float:
        """Seconds of the optimizer, with the norm of the gradient and clipping."""
        elements, tensors = worker.updated
        update = self.profile.update
        if offloads(self.strategy, self.times.device):
            moved = sum(kernel.bytes for kernel in update.kernels) + (12 if self.profile.clipped else 0)
            return updated(moved * elements, self.times.device)
        together = update.together or self.times.device.kind == "gpu"
        kernels = 1 if together else tensors
        seconds = sum(self.moved(elements, kernel.bytes * elements, kernels) for kernel in update.kernels)
        if self.profile.clipped:
            count = 1 if together else tensors
            seconds += self.moved(elements, 4 * elements, count) + self.moved(elements, 8 * elements, count)
        if self.times.device.kind == "gpu":
            seconds = max(seconds, len(update.kernels) * self.times.device.launch_seconds)
        return seconds

    # ---- the step ---------------------------------------------------------------------------------------------------

    def message(self, source: int, target: int, sizes: Iterable[int]) -> float:
        """Seconds of messages between two stages, one after the other; nothing where both are on one worker."""
        strategy = self.strategy
        source, target = source % strategy.pp, target % strategy.pp
        if source == target:
            return 0.0
        group = message_group(strategy, source, target)
        workers = workers_at_once(strategy, self.cluster, group)
        return sum(self.collective("send", size, group, workers) for size in sizes)

    @cached_property
    def _played(self) -> _Step:
        works = [work_of(self.at(worker), worker) for worker in self.parts.workers]
        ends = self._ends(works)
        finishes = [self.at(worker).finish(worker) for worker in self.parts.workers]
        last = max(end + f.reduce + f.update + f.exchange + f.host for end, f in zip(ends, finishes, strict=True))
        report = max(finish.report for finish in finishes)
        hidden = min(report, max(finish.update for finish in finishes)) if not self.waits_for_norm else 0.0
        return _Step(works, finishes, last + report - hidden, report - hidden)

    @property
    def step_seconds(self) -> float:
        """Of one optimizer step; quicker to know than all of `prediction`."""
        return self._played.seconds

    def prediction(self) -> Prediction:
        """See `predict`."""
        played = self._played
        works, finishes, step, report = played.works, played.finishes, played.seconds, played.report
        index = max(range(len(works)), key=lambda number: works[number].seconds)
        work, finish = works[index], finishes[index]
        exposed = work.exposed + work.spent.exchanges + finish.reduce + finish.exchange + report
        host = work.host + finish.host
        busy = work.spent.kernels + work.slowed + host
        bubble = max(0.0, step - busy - exposed - finish.update)
        communication = work.communication + work.spent.exchanges + work.messages
        communication += finish.reduce + finish.exchange + finish.report
        memory, available = self.memory, min(nodes.device.memory_bytes for nodes in self.cluster.nodes)
        strategy = self.strategy
        flops = self.model_flops
        return Prediction(
            step_seconds=step,
            compute_seconds=work.spent.kernels + work.slowed,
            communication_seconds=communication,
            exposed_communication_seconds=exposed,
            bubble_seconds=bubble,
            optimizer_seconds=finish.update,
            host_seconds=host,
            memory=memory,
            memory_available=available,
            model_flops=flops,
            peak_flops=strategy.workers * self.times.device.flops.get(DTYPES[self.profile.precision], 0.0),
            samples=self.batch_size,
            terms={
                "forward": work.forward,
                "backward": work.backward,
                "tensor exchanges": work.spent.exchanges,
                "gathers, reductions, buckets": work.communication,
                "messages": work.messages,
                "gradient sums": finish.reduce,
                "parameter exchange": finish.exchange,
                "report": finish.report,
            },
            origins=self.origins,
        )

    @property
    def waits_for_norm(self) -> bool:
        """Whether the norm of the gradient is known only when all workers have told theirs."""
        strategy = self.strategy
        whole = strategy.tp == strategy.pp == 1 and not strategy.splits_parameters
        return self.profile.clipped and not whole

    @property
    def memory(self) -> Memory:
        """Of the device that needs most."""
        return memory_of(self)

    @property
    def least_memory(self) -> int:
        """Bytes of the device that needs most, or fewer: without the pipeline workers between its ends."""
        return memory_of(self, ends=True).total

    @property
    def origins(self) -> dict[str, str]:
        """What the prediction rests on, by name."""
        found = origins(self.cluster, self.times.device)
        offloaded = offloads(self.strategy, self.times.device)
        return {name: origin for name, origin in found.items() if offloaded or name not in FIELDS}

    @property
    def model_flops(self) -> float:
        """Of the step, all devices together, without what is computed again."""
        return self.profile.flops * self.strategy.microbatches * self.strategy.replicas * self.strategy.tp

    def _ends(self, works: list[Work]) -> list[float]:
        """When each worker has done its last backward pass."""
        strategy = self.strategy
        if strategy.pp == 1:
            return [work.seconds for work in works]
        if strategy.pp * strategy.stages_per_worker * strategy.microbatches <= SHORT_TABLE:
            return played([table_of(self.at(worker), worker) for worker in self.parts.workers], self.messages)
        stages = [time for _, time in sorted((n, t) for work in works for n, t in work.times.items())]
        whole = pipeline_seconds(strategy.schedule, stages, strategy.pp, strategy.microbatches)
        whole += sum(sum(work.heads.values()) for work in works)
        tails = [sum(work.tails.values()) for work in works]
        ends, drained = [], 0.0
        for place, work in enumerate(works):
            tail = sum(tails[place:]) if strategy.splits_parameters else tails[place]
            ends.append(max(whole - drained, work.seconds - tails[place]) + tail)
            drained += stages[place].backward + (stages[place + 1].returns if place + 1 < len(stages) else 0.0)
        return _after_hosts(ends, stages, [0.0 if work.spent.inline else work.spent.launching for work in works])


def _after_hosts(ends: Sequence[float], stages: Sequence[StageTime], launching: Sequence[float]) -> list[float]:
    """The ends of workers whose hosts may be slower: the last gradients come after the hosts of those behind."""
    found: list[float] = []
    for place in reversed(range(len(ends))):
        hosts = launching[place]
        if found:
            hosts = max(hosts, found[-1] + stages[place + 1].returns + stages[place].backward)
        found.append(max(ends[place], hosts))
    return found[::-1]
