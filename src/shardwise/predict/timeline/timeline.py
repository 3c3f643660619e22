"""Timeline of one step: a discrete-event simulation of the operations that the program issues on each worker.

    order of passes          the tables that the runner executes                  (`splitting.schedule`)
    gradient buckets         all-reduced as soon as they are complete             (Li et al. 2020, section 4)
    sharded parameters       gathered while the previous block computes           (Zhao et al. 2023, section 3.3)
    pipeline messages        a pass begins when its inputs have arrived
    collectives              begin when all participants are ready: all wait for the slowest

`closed_form` gives the times of the parts; overlap and waiting result from the simulation. Equal replicas do the same
at the same time, so that one replica of each kind represents all of them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective
from shardwise.predict.closed_form.overlap import TimedPiece
from shardwise.predict.closed_form.segment_times import PassSeconds
from shardwise.predict.closed_form.step_time import Costs, costs_of, unhidden
from shardwise.predict.closed_form.streamed import FILLING, FULL, numbered
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.profile import Profile
from shardwise.predict.timeline.breakdown import Breakdown
from shardwise.predict.timeline.events import COMPUTE, Operation, Simulation
from shardwise.predict.timeline.replicas import SimulatedReplica, kinds_of_replicas, representatives
from shardwise.predict.timeline.staleness import paces
from shardwise.predict.workers.holdings import Stage, Worker
from shardwise.predict.workers.passes import EqualPasses, table
from shardwise.predict.workers.step_program import Piece
from shardwise.splitting.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Action, left_after
from shardwise.strategy import Strategy

TIMES = (
    *("step_seconds", "compute_seconds", "communication_seconds", "exposed_communication_seconds"),
    *("bubble_seconds", "optimizer_seconds", "host_seconds"),
)
"""Fields of a prediction that are times of a step."""

VERBS = {"all_gather": "gather", "reduce_scatter": "scatter", "all_reduce": "sum"}
NAMES = {FORWARD: "forward", BACKWARD: "backward", INPUT: "backward of inputs", WEIGHT: "backward of weights"}


@dataclass(frozen=True, slots=True)
class Timeline:
    """A simulated step.

    Attributes:
        prediction: the step as the worker sees it that computes longest.
        operations: operations of all simulated workers, in the order in which they ended.
        ranks: rank of each simulated worker: the first of its tensor-parallel ranks.
        names: name of each simulated worker for display.
    """

    prediction: Prediction
    operations: tuple[Operation, ...]
    ranks: tuple[int, ...]
    names: tuple[str, ...]

    def document(self) -> list[dict[str, Any]]:
        """Return a row for each operation that takes time: process, rank, stream, name, kind, start, seconds, notes."""
        return [
            {
                "process": self.names[operation.worker],
                "rank": self.ranks[operation.worker],
                "stream": operation.stream,
                "name": operation.name,
                "kind": operation.kind,
                "start_seconds": operation.start,
                "seconds": operation.end - operation.start,
                **operation.notes,
            }
            for operation in self.operations
            if operation.end > operation.start
        ]


def timeline(
    profile: Profile,
    strategy: Strategy,
    cluster: Cluster,
    batch_size: int = 0,
    slowed: Mapping[int, float] | None = None,
) -> Timeline:
    """Simulate one optimizer step on a cluster, operation by operation.

    Args:
        profile: the workload's profile, as for `step_time.predict`.
        strategy: the strategy to simulate.
        cluster: the cluster; its nodes may be of several kinds.
        batch_size: global batch size; 0 selects the workload's.
        slowed: rank -> factor by which its compute takes longer than usual (a straggler).

    Raises:
        StrategyError, RequestError: as `step_time.predict` does.
    """
    usual = costs_of(profile, strategy, cluster, batch_size)
    pipelines = representatives(usual.strategy, cluster, slowed or {})
    costs = _costs_by_device(usual, pipelines, batch_size)
    if strategy.delayed:
        filling, full = (_StepSimulation(usual, pipelines, costs, slowed or {}, steps=n) for n in (FILLING, FULL))
        more = full.timeline()
        return replace(more, prediction=_between(filling.timeline(full.busiest).prediction, more.prediction))
    found = _StepSimulation(usual, pipelines, costs, slowed or {}).timeline()
    if not strategy.local:
        return found
    averaging = _StepSimulation(usual, pipelines, costs, slowed or {}, averaging=True).timeline()
    return replace(averaging, prediction=_mean(found.prediction, averaging.prediction, usual))


def _mean(usual: Prediction, averaging: Prediction, costs: Costs) -> Prediction:
    """Return the mean over local steps: `fragments` in `local` of them average a fragment.

    An average that may take `delay` steps has so many times the time of a step to hide in.
    """
    waited, strategy = averaging.step_seconds - usual.step_seconds, costs.strategy
    exposed = unhidden(waited, strategy.delay * usual.step_seconds, costs.stages.overlap)
    share = strategy.fragments / strategy.local
    return replace(
        usual,
        step_seconds=usual.step_seconds + share * exposed,
        communication_seconds=usual.communication_seconds
        + share * (averaging.communication_seconds - usual.communication_seconds),
        exposed_communication_seconds=usual.exposed_communication_seconds + share * exposed,
    )


def _between(few: Prediction, more: Prediction) -> Prediction:
    """Return a step of a full pipeline from the predictions of FILLING and of FULL steps."""

    def each(name: str) -> float:
        difference: float = getattr(more, name) - getattr(few, name)
        return difference / (FULL - FILLING)

    terms = {name: (more.terms[name] - few.terms.get(name, 0.0)) / (FULL - FILLING) for name in more.terms}
    times: dict[str, Any] = {name: each(name) for name in TIMES}
    return replace(more, terms=terms, **times)


def _costs_by_device(usual: Costs, pipelines: Iterable[SimulatedReplica], batch_size: int) -> dict[int, Costs]:
    found = {id(usual.times.device): usual}
    for pipeline in pipelines:
        for device, _ in pipeline.machines:
            if id(device) not in found:
                found[id(device)] = costs_of(usual.profile, usual.strategy, usual.cluster, batch_size, device)
    return found


@dataclass(slots=True)
class _Host:
    """State of a worker's host while the operations of its program are issued.

    Attributes:
        number: number of the worker in the simulation.
        pipeline, pipeline_rank: replica and pipeline rank of the worker.
        costs: costs on its device.
        factor: factor by which its compute takes longer than usual.
        worker: its stages and shards.
        last: its last operation on the compute stream.
        barrier: operations that its next one on the compute stream has to wait for.
        sums: reductions of gradients that it waits for after its passes.
    """

    number: int
    pipeline: SimulatedReplica
    pipeline_rank: int
    costs: Costs
    factor: float
    worker: Worker
    last: Operation | None = None
    barrier: list[Operation] = field(default_factory=list)
    sums: list[Operation] = field(default_factory=list)


class _StepSimulation:
    """Issues the operations of each worker's program, then runs the simulation."""

    def __init__(
        self,
        usual: Costs,
        pipelines: Sequence[SimulatedReplica],
        costs: Mapping[int, Costs],
        slowed: Mapping[int, float],
        *,
        averaging: bool = False,
        steps: int = 1,
    ) -> None:
        self._averaging, self._slowed, self._steps = averaging, slowed, steps
        self.usual, self.strategy, self.pipelines = usual, usual.strategy, pipelines
        self.inline = usual.stages.blocking
        self.hosts = [
            _Host(
                index * self.strategy.pp + pipeline_rank,
                pipeline,
                pipeline_rank,
                costs[id(pipeline.machines[pipeline_rank][0])],
                pipeline.machines[pipeline_rank][1],
                usual.parts.workers[pipeline_rank],
            )
            for index, pipeline in enumerate(pipelines)
            for pipeline_rank in range(self.strategy.pp)
        ]
        self.simulation = Simulation([host.costs.stages.overlap for host in self.hosts])
        self._messages: dict[object, Operation] = {}
        self.busiest = 0

    def timeline(self, seen_by: int | None = None) -> Timeline:
        """Simulate the step; see the function `timeline`. `seen_by` is a worker's number; None: the busiest."""
        for host in self.hosts:
            self._program(host)
        seconds = self.simulation.run()
        breakdown = Breakdown(self.simulation.done, self._received(), inline=self.inline)
        if self.strategy.stale:
            seconds = self._pace()
        index = max(range(len(self.hosts)), key=breakdown.computed) if seen_by is None else seen_by
        self.busiest = index
        ranks = tuple(
            self.strategy.rank(dp=h.pipeline.row, fsdp=h.pipeline.column, pp=h.pipeline_rank) for h in self.hosts
        )
        prediction = breakdown.prediction(
            index,
            seconds,
            **self.usual.facts(),
        )
        names = tuple(_name(host, rank) for host, rank in zip(self.hosts, ranks, strict=True))
        return Timeline(prediction, tuple(self.simulation.done), ranks, names)

    def _pace(self) -> float:
        """Return the seconds between two updates of a training whose workers may be ahead of each other.

        Each worker's own step takes as long as its last operation says: none waits for another in it.
        """
        ends = [max(o.end for o in self.simulation.done if o.worker == host.number) for host in self.hosts]
        kinds = {host.pipeline.kind: end for host, end in zip(self.hosts, ends, strict=True)}
        own = [kinds[kind] for kind in kinds_of_replicas(self.strategy, self.usual.cluster, self._slowed)]
        return paces(lambda worker, step: own[worker], len(own), self.strategy.staleness.steps).step_seconds

    def _received(self) -> dict[int, list[Operation]]:
        """Return the pipeline messages by the number of the worker that receives them."""
        found: dict[int, list[Operation]] = {}
        for message in self._messages.values():
            found.setdefault(int(str(message.notes["to"])), []).append(message)
        return found

    # ---- one worker -------------------------------------------------------------------------------------------------

    def _program(self, host: _Host) -> None:
        strategy = self.strategy
        stages = {stage.number: stage for stage in host.worker.stages}
        for each in host.costs.stages.program.start(host.worker):
            seconds, together = host.costs.calls.of(each), ("weight", host.pipeline_rank)
            weight = self._issue(host, each.axis, "weight of the batch", "report", seconds, (), together)
            self._needed(host, weight)
        if strategy.delayed:
            self._stream(host)
            return
        for turn in table(strategy, host.pipeline_rank):
            self._turn(host, turn, stages[turn.action.stage])
        self._finish(host)

    def _turn(self, host: _Host, turn: EqualPasses, stage: Stage) -> None:
        self._arrive(host, turn.action)
        self._pass(host, turn, stage)
        self._send(host, turn.action, stage)

    def _stream(self, host: _Host) -> None:
        """Issue steps that begin before the one before them has ended, each with the update of that one."""
        rank, workers, stage = host.pipeline_rank, self.strategy.pp, host.worker.stages[0]
        turns = {(turn.action.kind, turn.action.microbatch): turn for turn in table(self.strategy, rank)}
        count, finish = self.strategy.microbatches, host.costs.finish(host.worker)
        for step in range(self._steps):
            left, report = left_after(rank, workers) if step else 0, None
            for action in numbered(rank, workers, count, step):
                if not left and report is None:
                    report = self._issue(
                        host, "world", "report", "report", finish.report, [host.last], ("report", step)
                    )
                left -= action.kind != FORWARD and left > 0
                self._turn(host, replace(turns[action.kind, action.microbatch % count], action=action), stage)
            if report is not None:
                self._needed(host, report)
            hosted = finish.host * host.factor
            seconds = (finish.reduce + finish.update + finish.exchange) * host.factor + hosted
            self._on_compute(host, Operation(host.number, COMPUTE, "update", "optimizer", seconds, hosted=hosted))
        self._on_compute(host, Operation(host.number, COMPUTE, "end", "end", 0.0))

    def _issue(
        self,
        host: _Host,
        stream: str,
        name: str,
        kind: str,
        seconds: float,
        after: Iterable[Operation | None] = (),
        together: object = None,
        **notes: object,
    ) -> Operation:
        """Issue a communication; those with equal `together` on several workers form one collective."""
        operation = Operation(host.number, stream, name, kind, seconds, crowds=True, notes=notes)
        return self.simulation.issue(operation, after, together)

    def _compute(
        self, host: _Host, action: Action, spent: PassSeconds, share: float = 1.0, part: str = ""
    ) -> Operation:
        """Issue a share of a pass on the compute stream, then its exchanges of tensor parallelism.

        Returns the last operation of the two; the next computation waits for the exchanges.
        """
        kernels = spent.kernels * share * host.factor
        launching = spent.launching * share * host.factor
        exchanges = spent.exchanges * share
        alone = spent.total * share * host.factor
        name = f"{action}{' ' if part else ''}{part}"
        operation = Operation(
            host.number,
            COMPUTE,
            name,
            NAMES[action.kind],
            kernels + (launching if self.inline else 0.0),
            launch=0.0 if self.inline or exchanges else launching,
            alone=0.0 if self.inline or exchanges else alone,
            hosted=launching if self.inline else 0.0,
            notes={"stage": action.stage, "microbatch": action.microbatch},
        )
        self._on_compute(host, operation)
        if not exchanges:
            return operation
        exchange = Operation(
            host.number,
            "tp",
            f"exchanges of {name}",
            "exchanges",
            exchanges,
            launch=0.0 if self.inline else launching,
            alone=0.0 if self.inline else alone,
            notes={"stage": action.stage, "microbatch": action.microbatch},
        )
        self.simulation.issue(exchange, [operation])
        host.barrier.append(exchange)
        if self.inline:
            self.simulation.wait(host.number, exchange)
        return exchange

    def _on_compute(self, host: _Host, operation: Operation) -> None:
        self.simulation.issue(operation, host.barrier)
        host.barrier.clear()
        host.last = operation
        if self.inline:
            self.simulation.wait(host.number, operation)

    def _needed(self, host: _Host, operation: Operation) -> None:
        """Make the next computation wait for an operation; on a CPU the host waits at once."""
        host.barrier.append(operation)
        if self.inline:
            self.simulation.wait(host.number, operation)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def _message(
        self, pipeline: SimulatedReplica, action: Action, source: int, target: int, seconds: float
    ) -> Operation:
        """Return the message from one stage to another for a microbatch, created when first asked for.

        `action` may be that of the sender or that of the receiver.
        """
        forward = action.kind == FORWARD
        key = pipeline.row, pipeline.column, forward, source, target, action.microbatch
        if key not in self._messages:
            pp = self.strategy.pp
            first = self.pipelines.index(pipeline) * pp
            self._messages[key] = Operation(
                first + source % pp,
                f"pp to {target % pp}",
                f"{'values' if forward else 'gradients'} {source} to {target}, microbatch {action.microbatch}",
                "message",
                seconds,
                notes={"to": first + target % pp, "microbatch": action.microbatch},
            )
        return self._messages[key]

    def _arrive(self, host: _Host, action: Action) -> None:
        if action.kind == WEIGHT:
            return
        kind = FORWARD if action.kind == FORWARD else BACKWARD
        for source, seconds in self.usual.stages.messages.get((kind, action.stage), ()):
            self._needed(host, self._message(host.pipeline, action, source, action.stage, seconds))

    def _send(self, host: _Host, action: Action, stage: Stage) -> None:
        after = [*host.barrier, host.last]
        for target, messages in self.usual.stages.program.sent(stage, action.kind):
            seconds = sum(map(self.usual.calls.of, messages))
            self.simulation.issue(self._message(host.pipeline, action, stage.number, target, seconds), after)

    # ---- gradients and parameters -----------------------------------------------------------------------------------

    def _pass(self, host: _Host, turn: EqualPasses, stage: Stage) -> None:
        """Issue a pass piece by piece, with the collectives around each; see `step_program`."""
        action, sync, stages = turn.action, turn.sync, host.costs.stages
        spent = stages.computed(stage, action.kind, sync, final=turn.final, first=turn.first)
        pieces = stages.pieces(stage, action.kind, sync, turn.final, spent)
        shares = _shares(pieces)
        waiting: list[tuple[TimedPiece, Operation | None]] = []
        asked: list[Operation | None] = [*host.barrier, host.last]
        for timed, share in zip(pieces, shares, strict=True):
            gather = timed.piece.communication.gather
            if gather is not None:
                self._needed(host, self._around(host, action, timed.piece, gather, timed.gather, asked))
            self._reduce(host, action, waiting, blocking=self.inline and sync is not None)
            asked = [*host.barrier, host.last]
            if timed.piece.end > timed.piece.first:
                self._compute(host, action, spent, share, timed.piece.name)
            if timed.reductions:
                waiting.append((timed, host.last))
                if self.inline or sync is None:
                    self._reduce(host, action, waiting, blocking=self.inline and sync is not None)
        self._reduce(host, action, waiting, blocking=self.inline and sync is not None)
        if sync is not None and sync.reduces:
            host.barrier += host.sums
            host.sums.clear()

    def _reduce(
        self, host: _Host, action: Action, waiting: list[tuple[TimedPiece, Operation | None]], *, blocking: bool
    ) -> None:
        """Issue the reductions of pieces that have computed; `blocking` ones stop the host."""
        for timed, computed in waiting:
            after: list[Operation | None] = [computed, *host.barrier]
            reductions = zip(timed.piece.communication.reductions, timed.reductions, strict=True)
            for number, (each, seconds) in enumerate(reductions):
                reduced = self._around(host, action, timed.piece, each, seconds, after, number)
                host.sums.append(reduced)
                if blocking:
                    self.simulation.wait(host.number, reduced)
                after = [reduced]
        waiting.clear()

    def _around(
        self,
        host: _Host,
        action: Action,
        piece: Piece,
        each: Collective,
        seconds: float,
        after: Iterable[Operation | None],
        number: int | None = None,
    ) -> Operation:
        """Issue a collective around a piece; the workers of one group issue it together.

        `number` is that of a reduction of the piece; None for its gather.
        """
        row = host.pipeline.row if each.axis == "fsdp" else None
        together = each.axis, row, host.pipeline_rank, str(action), piece.name, number
        name = f"{VERBS[each.operation]} {piece.name} of {action}"
        kind = "parameters" if number is None else "gradients"
        return self._issue(host, each.axis, name, kind, seconds, after, together, bytes=each.bytes)

    # ---- the end ----------------------------------------------------------------------------------------------------

    def _left(self, host: _Host, each: Collective, number: int) -> Operation:
        """Issue a reduction of gradients that was left when the passes were over."""
        together: object = None  # tensor-parallel ranks are one worker of the simulation
        if each.axis == "pp":
            together = "pp", host.pipeline.row, host.pipeline.column, each.group, each.bytes
        elif each.axis != "tp":
            together = "left", host.pipeline_rank, number
        after, seconds = [*host.barrier, host.last], host.costs.calls.of(each)
        return self._issue(host, each.axis, "sum of gradients", "gradients", seconds, after, together, bytes=each.bytes)

    def _finish(self, host: _Host) -> None:
        """Issue what follows the passes: remaining all-reduces, the update, and broadcasts of updated parameters."""
        costs, worker = host.costs, host.worker
        finish = costs.finish(worker)
        for each in host.sums:
            self._needed(host, each)
        host.sums.clear()
        for number, left in enumerate(costs.stages.program.sums(worker)):
            self._needed(host, self._left(host, left, number))
        after = [*host.barrier, host.last]
        report = None
        reports = costs.stages.program.report(worker)
        for number, summed in enumerate(reports):
            last = number == len(reports) - 1
            together = "report", None if last else host.pipeline.row
            seconds = costs.calls.of(summed)
            stream = "dp" if self.strategy.local and last else "world"
            report = self._issue(host, stream, "report", "report", seconds, after, together, bytes=summed.bytes)
            if not last or costs.waits_for_report:
                self._needed(host, report)
        hosted = finish.host * host.factor
        updating = finish.update * (1.0 if self.strategy.ps else host.factor)  # a server is no slower for a slow worker
        update = Operation(host.number, COMPUTE, "update", "optimizer", updating + hosted, hosted=hosted)
        self._on_compute(host, update)
        if finish.exchange:
            told = self._issue(
                host,
                "ps" if self.strategy.ps else "dp",
                "gradients and parameters" if self.strategy.ps else "updated parameters",
                "parameters",
                finish.exchange,
                [update],
                None if self.strategy.stale else ("told", host.pipeline_rank),
            )
            self._needed(host, told)
        if report is not None:
            self._needed(host, report)
        if self._averaging:
            self._average(host, finish.averaging)
        self._on_compute(host, Operation(host.number, COMPUTE, "end", "end", 0.0))

    def _average(self, host: _Host, copies: float) -> None:
        """Issue the average of the largest fragment after local steps."""
        averages = host.costs.stages.program.averages(host.worker)
        largest = max(averages, key=lambda each: sum(message.bytes for message in each))
        packed = Operation(host.number, COMPUTE, "pack parameters", "optimizer", copies / len(averages) * host.factor)
        self._on_compute(host, packed)
        for number, each in enumerate(largest):
            together = "average", host.pipeline_rank, number
            seconds = host.costs.calls.of(each)
            name = "average of parameters"
            sent = self._issue(host, "dp", name, "averages", seconds, [packed], together, bytes=each.bytes)
            self._needed(host, sent)


def _shares(pieces: Sequence[TimedPiece]) -> list[float]:
    """Return the share of a pass's compute that falls to each piece; equal ones if it takes no time."""
    whole = sum(timed.compute for timed in pieces)
    return [timed.compute / whole if whole else 1.0 / len(pieces) for timed in pieces]


def _name(host: _Host, rank: int) -> str:
    """Return the name of a worker for display: rank, stages, device, and how much slower it is."""
    numbers = ", ".join(str(stage.number) for stage in host.worker.stages)
    several = "s" if len(host.worker.stages) > 1 else ""
    where = f", stage{several} {numbers}" if host.costs.strategy.pp > 1 else ""
    slow = f", {host.factor:g} times as slow" if host.factor != 1.0 else ""
    return f"rank {rank}{where} on {host.costs.times.device.name}{slow}"
