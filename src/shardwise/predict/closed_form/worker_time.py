"""Sums over all passes of a step on one pipeline worker, from forward to backward; without a pipeline, its only worker.

`step_time` adds the work after the passes: optimizer, remaining all-reduces, report.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from shardwise.predict.closed_form.overlap import Passed
from shardwise.predict.closed_form.pipeline import StageTime, TimedPass
from shardwise.predict.closed_form.segment_times import PassSeconds
from shardwise.predict.closed_form.stage_time import StageCosts
from shardwise.predict.workers.holdings import Worker
from shardwise.predict.workers.passes import EqualPasses, table, turns
from shardwise.splitting.schedule import BACKWARD, FORWARD, INPUT, WEIGHT


@dataclass(frozen=True, slots=True)
class WorkerTime:
    """Seconds of all passes of a worker.

    Attributes:
        times: times of one microbatch by stage index.
        spent: kernels, exchanges and launches.
        forward, backward: compute of the passes of each kind.
        communication: gathers, scatters and buckets, hidden or not.
        exposed: part of `communication` that the worker waits for.
        slowed: time by which compute takes longer because the worker communicates meanwhile.
        messages: messages that it receives from other stages.
        heads: by stage index, extra time of the first forward pass over the others: gathers.
        tails: by stage index, extra time of the last backward pass over the others: reductions.
    """

    times: Mapping[int, StageTime]
    spent: PassSeconds
    forward: float
    backward: float
    communication: float
    exposed: float
    slowed: float
    messages: float
    heads: Mapping[int, float]
    tails: Mapping[int, float]

    @property
    def device(self) -> float:
        """Return the seconds of the device if its host runs ahead and no other stage has to be waited for."""
        return self.spent.device + self.exposed + self.slowed

    @property
    def host(self) -> float:
        """Return the seconds of the host on a CPU; on a GPU those for which the device waits for its host.

        The host catches up while the device waits for communication.
        """
        return self.spent.launching if self.spent.inline else max(0.0, self.spent.waiting - self.exposed - self.slowed)

    @property
    def seconds(self) -> float:
        """Return the seconds of all passes, without waiting for other stages."""
        return self.device + (0.0 if self.spent.inline else self.host)


def work_of(costs: StageCosts, worker: Worker) -> WorkerTime:
    """Sum the times of all passes of a worker."""
    stages = {stage.number: stage for stage in worker.stages}
    passes = [
        (turn, costs.passed(stages[turn.action.stage], turn.action.kind, turn.sync, turn.final, turn.first))
        for turn in turns(costs.strategy, worker.pipeline_rank)
    ]
    spent = PassSeconds(
        sum(turn.count * passed.compute.kernels for turn, passed in passes),
        sum(turn.count * passed.compute.exchanges for turn, passed in passes),
        sum(turn.count * passed.compute.launching for turn, passed in passes),
        any(passed.compute.inline for _, passed in passes),
        _lag(passes),
    )
    exposed = _exposed(costs, passes)
    turned = [turn for turn, _ in passes]
    seconds = [
        _of_device(costs, passed.compute) + waited + passed.slowed
        for (_, passed), waited in zip(passes, exposed, strict=True)
    ]
    usual = _usual(turned, seconds)
    times = _times(costs, stages, usual)
    return WorkerTime(
        times,
        spent,
        sum(turn.count * passed.compute.total for turn, passed in passes if turn.action.kind == FORWARD),
        sum(turn.count * passed.compute.total for turn, passed in passes if turn.action.kind != FORWARD),
        sum(turn.count * passed.communication for turn, passed in passes),
        sum(turn.count * waited for turn, waited in zip(turned, exposed, strict=True)),
        sum(turn.count * passed.slowed for turn, passed in passes),
        costs.strategy.microbatches * sum(time.arrives + time.returns for time in times.values()),
        *_ends(costs, turned, seconds, usual),
    )


def _of_device(costs: StageCosts, spent: PassSeconds) -> float:
    """Return the seconds of a pass; with those for which it waits for a host that waits for messages itself."""
    return spent.total if costs.stops_host else spent.device


def _lag(passes: Sequence[tuple[EqualPasses, Passed]]) -> float:
    """Return the seconds for which a device waits for its host: rounds of the usual passes, then all others."""
    if not any(passed.compute.waiting for _, passed in passes):
        return 0.0
    usual: dict[tuple[int, str], int] = {}
    for index, (turn, _) in enumerate(passes):
        key = turn.action.stage, turn.action.kind
        if key not in usual or turn.count > passes[usual[key]][0].count:
            usual[key] = index
    rounds = min(passes[index][0].count for index in usual.values())
    found = sum((passes[index][1].compute for index in usual.values()), PassSeconds()).times(rounds)
    for index, (turn, passed) in enumerate(passes):
        rest = turn.count - (rounds if usual[turn.action.stage, turn.action.kind] == index else 0)
        found += passed.compute.times(rest) if rest else PassSeconds()
    return found.waiting


def _exposed(costs: StageCosts, passes: Sequence[tuple[EqualPasses, Passed]]) -> list[float]:
    """Return the exposed communication of each pass, in seconds.

    A pipeline worker waits for its gradient buckets only when all passes are over. The buckets of one stage queue
    behind those of its later stages, and the passes of its earlier stages hide them.
    """
    found = [passed.exposed for _, passed in passes]
    if costs.strategy.pp == 1 or costs.strategy.splits_parameters:
        return found
    final = [index for index, (turn, _) in enumerate(passes) if turn.final]
    final.sort(key=lambda index: -passes[index][0].action.stage)
    now = channel = 0.0
    for index in final:
        passed = passes[index][1]
        now += passed.compute.device + passed.slowed
        if passed.communication:
            channel = max(channel + passed.communication, now + passed.exposed)
        found[index] = 0.0
    if final:
        found[final[-1]] = max(0.0, channel - now)
    return found


def _usual(turned: Iterable[EqualPasses], seconds: Iterable[float]) -> dict[tuple[int, str], float]:
    """Map (stage, kind) to the seconds of its most frequent pass."""
    found: dict[tuple[int, str], tuple[int, float]] = {}
    for turn, each in zip(turned, seconds, strict=True):
        key = turn.action.stage, turn.action.kind
        found[key] = max(found.get(key, (0, 0.0)), (turn.count, each))
    return {key: each for key, (_, each) in found.items()}


def _times(costs: StageCosts, stages: Iterable[int], usual: Mapping[tuple[int, str], float]) -> dict[int, StageTime]:
    return {
        stage: StageTime(
            usual[stage, FORWARD],
            usual[stage, INPUT] if (stage, INPUT) in usual else usual[stage, BACKWARD],
            usual.get((stage, WEIGHT), 0.0),
            costs.waits(FORWARD, stage),
            costs.waits(BACKWARD, stage),
        )
        for stage in stages
    }


def table_of(costs: StageCosts, worker: Worker) -> list[TimedPass]:
    """List all passes of a worker in its order, with their times.

    The worker waits for its gradient buckets only when all passes are over.
    """
    stages = {stage.number: stage for stage in worker.stages}
    sharded = costs.strategy.splits_parameters
    found = []
    for turn in table(costs.strategy, worker.pipeline_rank):
        action = turn.action
        passed = costs.passed(stages[action.stage], action.kind, turn.sync, turn.final, turn.first)
        seconds = _of_device(costs, passed.compute) + passed.slowed + (passed.exposed if sharded else 0.0)
        spent = passed.compute
        launching = 0.0 if spent.inline or costs.stops_host else spent.launching
        after = (0.0, 0.0) if sharded else (passed.exposed, passed.communication)
        found.append(TimedPass(action, seconds, launching, spent.total, *after))
    return found


def _ends(
    costs: StageCosts, turned: list[EqualPasses], seconds: list[float], usual: Mapping[tuple[int, str], float]
) -> tuple[dict[int, float], dict[int, float]]:
    """Return `heads` and `tails` of `WorkerTime`; both are empty without a pipeline, where no stage waits for them."""
    heads: dict[int, float] = {}
    tails: dict[int, float] = {}
    if costs.strategy.pp == 1:
        return heads, tails
    for turn, each in zip(turned, seconds, strict=True):
        stage = turn.action.stage
        like = usual[stage, turn.action.kind]
        if turn.action.kind == BACKWARD and (stage, INPUT) in usual:  # the only backward pass that is not split
            like = usual[stage, INPUT] + usual[stage, WEIGHT]
        more = max(0.0, each - like)
        if turn.action.kind == FORWARD:
            heads.setdefault(stage, more)
        elif turn.final:
            tails[stage] = more
    return heads, tails
