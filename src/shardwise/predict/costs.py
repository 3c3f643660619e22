"""What a strategy costs, in closed form: from a profile, in the time that a search over thousands of strategies has.

    step = passes of the busiest pipeline worker + bubble + what it waits for others + optimizer + report

Implemented in: `timing` (kernels and exchanges of each link), `parts` (who holds what), `passes` (what is hidden behind
compute), `pipelines` (bubbles), `memory` (bytes), `issuing` (messages).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.errors import StrategyError
from shardwise.parallel.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Action
from shardwise.predict.issuing import Sync, actions_of, syncs
from shardwise.predict.kernel import Kernel
from shardwise.predict.kernels import collective_seconds, origins
from shardwise.predict.memory import memory_of
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
from shardwise.predict.pipelines import StageTime, pipeline_seconds
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile import Profile
from shardwise.predict.timing import DTYPES, Spent, Timed, timed
from shardwise.strategy import Strategy


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


def costs_of(profile: Profile, strategy: Strategy, cluster: Cluster, batch_size: int = 0) -> Costs:
    """The parts of a prediction, which the timeline is made of too. Raises as `predict` does."""
    size = batch_size or profile.batch_size
    strategy = strategy.for_batch(size)
    _check(profile, strategy, size)
    times = timed(profile, cluster, strategy)
    if profile.device != times.device.kind:
        raise StrategyError(
            f"the profile of {profile.name} is for a {profile.device}, {cluster.name} has {times.device.name}: "
            f"profile it for a {times.device.kind}"
        )
    key = (
        "parts",
        id(times),
        strategy.with_(microbatches=0, schedule="1f1b", stages=0) if strategy.pp == 1 else strategy,
    )
    if key not in profile.kept:
        sums = times.forward.total
        profile.kept[key] = parts_of(profile, strategy, [b - a for a, b in pairwise(sums)])
    parts = profile.kept[key]
    assert isinstance(parts, Parts)
    return Costs(profile, strategy, cluster, times, parts, size)


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
    """

    reduce: float
    update: float
    exchange: float
    report: float


class Costs:
    """The times of one strategy's parts; see `predict`."""

    def __init__(
        self, profile: Profile, strategy: Strategy, cluster: Cluster, times: Timed, parts: Parts, batch_size: int
    ) -> None:
        self.profile, self.strategy, self.cluster = profile, strategy, cluster
        self.times, self.parts, self.batch_size = times, parts, batch_size
        self.blocking = times.device.kind == "cpu"
        self.overlap = times.device.overlap
        self.arrives, self.returns = self._waits()

    def _waits(self) -> tuple[dict[int, float], dict[int, float]]:
        """Seconds of the messages that each stage waits for before a forward, and before a backward pass."""
        key = ("waits", id(self.parts))
        if key not in self.profile.kept:
            there: dict[int, float] = {}
            back: dict[int, float] = {}
            for number, stage in self.parts.stages.items() if self.strategy.pp > 1 else ():
                for found, messages in ((there, stage.sent), (back, stage.returned)):
                    for target, sizes in messages:
                        found[target] = found.get(target, 0.0) + self.message(number, target, sizes)
            self.profile.kept[key] = there, back
        found_both = self.profile.kept[key]
        assert isinstance(found_both, tuple)
        return found_both

    # ---- one collective, one kernel ---------------------------------------------------------------------------------

    def collective(self, operation: str, size: int, group: Group) -> float:
        """Seconds; the same call costs nothing to ask for again."""
        if group.size <= 1:
            return 0.0
        crowd = self.strategy.workers if self.cluster.collectives else 0
        key = ("collective", id(self.cluster), operation, size, group, crowd)
        if key not in self.profile.kept:
            self.profile.kept[key] = collective_seconds(
                Collective(operation, size, group), self.cluster, self.strategy.workers
            )
        found = self.profile.kept[key]
        assert isinstance(found, float)
        return found

    def moved(self, elements: float, size: float, count: int) -> float:
        """Seconds of `count` kernels that move `size` bytes of `elements` elements in all."""
        if count < 1 or elements < 1:
            return 0.0
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
        if not forward and self.strategy.recompute == "full":
            for block in stage.blocks:
                spent += times.again(block.first, block.end)
        return spent + Spent(exchanges=self._norms(stage, forward))

    def _norms(self, stage: Stage, forward: bool) -> float:
        if self.strategy.replicas == 1 or not self.times.normalised:
            return 0.0
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        total = 0.0
        again = self.strategy.recompute == "full" and not forward
        for link, channels in self.times.normalised:
            if not stage.first <= link < stage.end:
                continue
            gather = self.collective("all_gather", 4 * self.strategy.replicas * (2 * channels + 1), group)
            if forward:
                total += gather
            else:
                total += self.collective("all_reduce", 8 * channels, group)
                total += gather if again and any(b.first <= link < b.end for b in stage.blocks) else 0.0
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
        spent = self.spent(stage, kind)
        if kind not in (FORWARD, INPUT):
            spent += Spent(kernels=self._gradients(stage, final=final, first=first))
        if sync is not None and kind != WEIGHT:
            return self._sharded(stage, kind, sync, spent)
        if final and stage.buckets and kind != WEIGHT:
            total, exposed = bucketed(self.buckets(stage, spent.total), spent.total)
            return Passed(spent, total, exposed, slowed(total - exposed, self.overlap))
        return Passed(spent)

    def buckets(self, stage: Stage, seconds: float) -> list[tuple[float, float]]:
        """(when it is complete, how long it takes) of each bucket of a backward pass of `seconds`."""
        times = self.times
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        whole = times.backward.total[stage.end] - times.backward.total[stage.first]
        stretch = seconds / whole if whole else 1.0
        return [
            (
                (times.backward.total[stage.end] - times.backward.total[bucket.ready]) * stretch,
                self.collective("all_reduce", bucket.bytes, group),
            )
            for bucket in stage.buckets
        ]

    def _gradients(self, stage: Stage, *, final: bool, first: bool) -> float:
        """What is done to gradients beside computing them: added to those of earlier microbatches, put into buckets."""
        key = ("gradients", id(self.parts), stage.number)
        if key not in self.profile.kept:
            own = [
                p
                for p in self.profile.parameters
                if p.trained and any(stage.first <= link < stage.end for link in p.links)
            ]
            self.profile.kept[key] = sum(p.elements for p in own), sum(p.bytes for p in own), len(own)
        found = self.profile.kept[key]
        assert isinstance(found, tuple)
        elements, size, count = found
        seconds = 0.0 if first else self.moved(elements, 3 * size, count)
        if final and stage.buckets and not self.strategy.splits_parameters:
            copies = 1 if self.strategy.tp == self.strategy.pp == 1 else 2
            seconds += copies * self.moved(elements, 2 * size, count)
        return seconds

    def pieces(self, stage: Stage, kind: str, sync: Sync, spent: Spent) -> tuple[list[Piece], Piece]:
        """The parts of a pass between gathers, in the order in which they compute, and what belongs to all of them."""
        forward = kind == FORWARD
        sums = self.times.forward if forward else self.times.backward
        whole = sums.total[stage.end] - sums.total[stage.first]
        stretch = spent.total / whole if whole else 1.0
        found: list[Piece] = []
        at = stage.first
        for block in stage.blocks:
            if block.first > at:
                found.append(Piece((sums.total[block.first] - sums.total[at]) * stretch))
            gather, reduce = self._group(block.gathered, sync.blocks, sync.reduces)
            found.append(Piece((sums.total[block.end] - sums.total[max(at, block.first)]) * stretch, gather, reduce))
            at = max(at, block.end)
        if at < stage.end:
            found.append(Piece((sums.total[stage.end] - sums.total[at]) * stretch))
        gather, reduce = self._group(stage.root, sync.root, sync.reduces)
        return (found if forward else found[::-1]), Piece(0.0, gather, reduce)

    def _group(self, group: Gathered | None, gathers: bool, reduces: bool) -> tuple[float, float]:
        if group is None:
            return 0.0, 0.0
        fsdp = group_of(self.strategy, "fsdp")
        gather = self.collective("all_gather", group.gather, fsdp) if gathers else 0.0
        reduce = self.collective("reduce_scatter", group.reduce, fsdp) if reduces and group.reduce else 0.0
        if reduce and self.strategy.dp > 1:
            reduce += self.collective("all_reduce", group.reduce // self.strategy.fsdp, group_of(self.strategy, "dp"))
        return gather, reduce

    def _sharded(self, stage: Stage, kind: str, sync: Sync, spent: Spent) -> Passed:
        copied = 0.0
        for group, gathers in (*((block.gathered, sync.blocks) for block in stage.blocks), (stage.root, sync.root)):
            if group is not None:
                copied += self.moved(group.gather / 4, 2 * group.gather, 1) if gathers else 0.0
                copied += self.moved(group.reduce / 4, 2 * group.reduce, 1) if sync.reduces else 0.0
        spent += Spent(kernels=copied)
        pieces, root = self.pieces(stage, kind, sync, spent)
        total, exposed = gathered(pieces, root, backward=kind != FORWARD, blocking=self.blocking)
        return Passed(spent, total, exposed, slowed(total - exposed, self.overlap))

    # ---- after the passes -------------------------------------------------------------------------------------------

    def finish(self, worker: Worker) -> Finish:
        """What a worker does after its last backward pass."""
        key = ("finish", id(self.parts), worker.place)
        if key not in self.profile.kept:
            self.profile.kept[key] = self._finish(worker)
        found = self.profile.kept[key]
        assert isinstance(found, Finish)
        return found

    def _finish(self, worker: Worker) -> Finish:
        strategy = self.strategy
        replicas = group_of(strategy, "replicas", worker.place)
        reduce = sum(self.collective("all_reduce", bucket.bytes, replicas) for bucket in worker.twice)
        if strategy.tp > 1:
            reduce += sum(self.collective("all_reduce", size, group_of(strategy, "tp")) for size in worker.summed)
        for workers, size in worker.tied:
            step = (workers[-1] - workers[0]) // max(len(workers) - 1, 1)
            group = Group(len(workers), step * strategy.tp, workers[0] * strategy.tp)
            reduce += self.collective("all_reduce", size, group)
        exchange = sum(self.collective("broadcast", size, replicas) for size in worker.broadcast)
        report = self.collective("all_reduce", REPORT_BYTES, group_of(strategy, "world"))
        if self.profile.weighted:
            report += self.collective("all_reduce", 8, replicas)
        return Finish(reduce, self.update(worker), exchange, report)

    def update(self, worker: Worker) -> float:
        """Seconds of the optimizer, with the norm of the gradient and clipping."""
        elements, tensors = worker.updated
        update = self.profile.update
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
        pp = self.strategy.pp
        if source % pp == target % pp:
            return 0.0
        group = message_group(self.strategy, source % pp, target % pp)
        return sum(self.collective("send", size, group) for size in sizes)

    def prediction(self) -> Prediction:
        """See `predict`."""
        works = [_Work.of(self, worker) for worker in self.parts.workers]
        ends = self._ends(works)
        finishes = [self.finish(worker) for worker in self.parts.workers]
        last = max(end + f.reduce + f.update + f.exchange for end, f in zip(ends, finishes, strict=True))
        report = max(finish.report for finish in finishes)
        hidden = min(report, max(finish.update for finish in finishes)) if not self._waits_for_norm() else 0.0
        step = last + report - hidden
        index = max(range(len(works)), key=lambda number: works[number].seconds)
        work, finish = works[index], finishes[index]
        exposed = work.exposed + work.spent.exchanges + finish.reduce + finish.exchange + report - hidden
        busy = work.spent.kernels + work.slowed + work.spent.host
        bubble = max(0.0, step - busy - exposed - finish.update)
        communication = work.communication + work.spent.exchanges + work.messages
        communication += finish.reduce + finish.exchange + finish.report
        memory, available = memory_of(self), min(nodes.device.memory_bytes for nodes in self.cluster.nodes)
        strategy = self.strategy
        flops = self._model_flops()
        return Prediction(
            step_seconds=step,
            compute_seconds=work.spent.kernels + work.slowed,
            communication_seconds=communication,
            exposed_communication_seconds=exposed,
            bubble_seconds=bubble,
            optimizer_seconds=finish.update,
            host_seconds=work.spent.host,
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
            origins=origins(self.cluster, self.times.device),
        )

    def _waits_for_norm(self) -> bool:
        """Whether the norm of the gradient is known only when all workers have told theirs."""
        strategy = self.strategy
        whole = strategy.tp == strategy.pp == 1 and not strategy.splits_parameters
        return self.profile.clipped and not whole

    def _model_flops(self) -> float:
        key = ("flops",)
        if key not in self.profile.kept:
            self.profile.kept[key] = self.profile.flops()
        found = self.profile.kept[key]
        assert isinstance(found, float)
        return found * self.strategy.microbatches * self.strategy.replicas * self.strategy.tp

    def _ends(self, works: list[_Work]) -> list[float]:
        """When each worker has done its last backward pass."""
        strategy = self.strategy
        if strategy.pp == 1:
            return [work.seconds for work in works]
        stages = [time for _, time in sorted((n, t) for work in works for n, t in work.times.items())]
        whole = pipeline_seconds(strategy.schedule, stages, strategy.pp, strategy.microbatches)
        ends, drained = [], 0.0
        for place, work in enumerate(works):
            ends.append(max(whole - drained, work.seconds) + work.tail)
            drained += stages[place].backward + (stages[place + 1].returns if place + 1 < len(stages) else 0.0)
        return ends


@dataclass(frozen=True, slots=True)
class _Work:
    """What one pipeline worker does in all its passes.

    Attributes:
        times: of its stages, for one microbatch.
        tail: what the last backward passes take longer than the others.
    """

    times: dict[int, StageTime]
    spent: Spent
    forward: float
    backward: float
    communication: float
    exposed: float
    slowed: float
    messages: float
    tail: float

    @property
    def seconds(self) -> float:
        """Without waiting for other stages."""
        return self.spent.total + self.exposed + self.slowed - self.tail

    @classmethod
    def of(cls, costs: Costs, worker: Worker) -> _Work:
        """Adds up the passes of a worker."""
        return _add_up(costs, worker)


@lru_cache(maxsize=4096)
def _passes(strategy: Strategy, place: int) -> tuple[tuple[Action, Sync | None, bool, bool, int], ...]:
    """The different passes of a worker: (one of them, what is synchronised, final, first, how many)."""
    actions = actions_of(strategy, place)
    shards = syncs(strategy, actions) if strategy.splits_parameters else [None] * len(actions)
    last = {action.stage: index for index, action in enumerate(actions) if action.kind not in (FORWARD, WEIGHT)}
    seen: set[int] = set()
    counted: dict[tuple[str, int, Sync | None, bool, bool], tuple[Action, int]] = {}
    for index, (action, sync) in enumerate(zip(actions, shards, strict=True)):
        final = last[action.stage] == index
        first = action.kind != FORWARD and action.stage not in seen
        if action.kind not in (FORWARD, INPUT):
            seen.add(action.stage)
        key = action.kind, action.stage, sync, final, first
        example, count = counted.get(key, (action, 0))
        counted[key] = example, count + 1
    return tuple((example, key[2], key[3], key[4], count) for key, (example, count) in counted.items())


def _add_up(costs: Costs, worker: Worker) -> _Work:
    strategy = costs.strategy
    stages = {stage.number: stage for stage in worker.stages}
    spent = Spent()
    forward = backward = communication = exposed = slow = 0.0
    usual: dict[tuple[int, str], tuple[int, float]] = {}
    last: dict[int, tuple[str, float]] = {}
    for action, sync, final, first, count in _passes(strategy, worker.place):
        passed = costs.passed(stages[action.stage], action.kind, sync, final, first)
        spent += passed.compute.times(count)
        communication += count * passed.communication
        exposed += count * passed.exposed
        slow += count * passed.slowed
        if action.kind == FORWARD:
            forward += count * passed.compute.total
        else:
            backward += count * passed.compute.total
        usual[action.stage, action.kind] = max(
            usual.get((action.stage, action.kind), (0, 0.0)), (count, passed.seconds)
        )
        if final:
            last[action.stage] = action.kind, passed.seconds
    tail = 0.0
    if strategy.pp > 1:
        tail = sum(max(0.0, seconds - usual[stage, kind][1]) for stage, (kind, seconds) in last.items())
    times = {}
    for number in stages:
        inputs = usual.get((number, INPUT)) or usual[number, BACKWARD]
        times[number] = StageTime(
            usual[number, FORWARD][1],
            inputs[1],
            usual.get((number, WEIGHT), (0, 0.0))[1],
            costs.arrives.get(number, 0.0),
            costs.returns.get(number, 0.0),
        )
    messages = strategy.microbatches * sum(time.arrives + time.returns for time in times.values())
    return _Work(times, spent, forward, backward, communication, exposed, slow, messages, tail)
