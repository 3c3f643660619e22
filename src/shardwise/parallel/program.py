"""The parallel model on this worker: an engine that computes gradients, and the rest of a training step around it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import NotFinite, WorkloadError
from shardwise.launch import regroup, watch
from shardwise.launch.exit import die_with_parent
from shardwise.launch.stop import requested
from shardwise.parallel.data.collected import Collected
from shardwise.parallel.data.local_steps import LocalSteps, check_local
from shardwise.parallel.data.owed import OwedPieces
from shardwise.parallel.data.same_data import check_same_data
from shardwise.parallel.data.turns import check_turns
from shardwise.parallel.engine import Engine
from shardwise.parallel.faults import parameter_fault
from shardwise.parallel.judgement import Judge, Judgement, buffers_of
from shardwise.parallel.mesh import Allocating, Mesh
from shardwise.parallel.optim.after_step import after_step_of
from shardwise.parallel.optim.average import Average
from shardwise.parallel.optim.clipping import clip, clip_factor, local_gradients, local_tensors, squared_norm
from shardwise.parallel.optim.delayed import GRADIENT, DelayedGradient, TakenStep
from shardwise.parallel.optim.schedule import note_step
from shardwise.parallel.optim.update import ParameterUpdate
from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.gather import anywhere, gather_full
from shardwise.parallel.state.layout import TensorPiece
from shardwise.parallel.state.pass_state import passes_undone
from shardwise.splitting.balance import Cuts
from shardwise.strategy import Strategy
from shardwise.workload.data import Share, cut_batch
from shardwise.workload.evaluation import values_of
from shardwise.workload.loading import Loading
from shardwise.workload.one_batch import in_one_batch
from shardwise.workload.reading.loader import Loader, share_of
from shardwise.workload.turns import losses_of_turns
from shardwise.workload.workload import Workload

LOCAL = "local"
"""Entry of a program's state that holds the numbers of local steps."""

OUTER, REPLICA = "outer/", "replica/"
"""Beginnings of the names of an outer optimizer's tensors, and of those of one of several replicas."""


def build_engine(workload: Workload, strategy: Strategy, mesh: Mesh, cuts: Cuts | None = None) -> Engine:
    """Build the engine that runs `strategy`: the module unchanged, or its parts of the module's graph. Collective.

    `cuts` are the cut points of a graph into stages and blocks. None chooses them by measured layer costs.
    """
    if strategy.runs_module:
        from shardwise.parallel.data.module_engine import ModuleEngine

        return ModuleEngine(workload, strategy, mesh)
    from shardwise.parallel.graph.graph_engine import GraphEngine

    return GraphEngine(workload, strategy, mesh, cuts)


@dataclass(frozen=True, slots=True)
class _TakenTurn:
    """Turn of a step that was taken.

    Attributes:
        report: its sums over all workers, see `Program._report`.
        losses: its losses by name, 0-d.
        norm: norm of its gradient before clipping; None without clipping.
        applied: whether its update was applied.
    """

    report: Tensor
    losses: dict[str, Tensor]
    norm: Tensor | None
    applied: bool


class Program:
    """A workload under a strategy on this worker. Every method except the plain getters is collective.

    Attributes:
        workload: the workload to train.
        strategy: how it is split, with the number of microbatches settled.
        mesh: this worker's position among all workers.
        engine: the engine that computes the gradients.
        optimizer: optimizer of the parameters that this worker updates, which may be none.
        scheduler: scheduler of that optimizer's learning rate. None without a schedule.
        steps: optimizer steps completed.
        gradient_norm: global norm of the last step's gradient before clipping, in which turns are clipped one by one.
            None without `clip_norm`.
        losses: losses of the last step by name, 0-d, if the workload has several; they are global means.
        midway: whether a turn of a step has been applied and the step is not complete.
    """

    def __init__(self, workload: Workload, mesh: Mesh, together: Mesh, engine: Engine) -> None:
        self.workload, self.strategy, self.mesh, self.engine = workload, mesh.strategy, mesh, engine
        self._together = together
        self.steps = 0
        self.gradient_norm: Tensor | None = None
        self.losses: dict[str, Tensor] = {}
        self.midway = False
        self._update = ParameterUpdate(workload, together.strategy, together, engine)
        self._members = [frozenset(names) for names in self._update.turns]
        self._owed = OwedPieces(engine, together)
        self.optimizer, self.scheduler = self._update.optimizer, self._update.schedule.scheduler
        self._average: Average | None = None
        if workload.average is not None:
            with mesh.allocating():
                self._average = Average(engine.parameters, workload.average)
        self._served = self._update.served
        after = workload if self._served is None else replace(workload, after_step=None)  # servers call it
        self._after_step = after_step_of(after, engine.parameters, engine.held, together)
        self._local = LocalSteps(engine.held, engine.trained, mesh) if mesh.strategy.local else None
        self._delayed: DelayedGradient | None = None
        if mesh.strategy.delayed:
            streamed: Any = engine  # a graph engine: the strategy has a pipeline
            self._delayed = DelayedGradient(engine, mesh, streamed.stream)
            note_step(self.optimizer)  # the schedule moves in the first step too, which has no update
        self._whole_everywhere = self._is_whole_everywhere()
        self._constants: dict[float, Tensor] = {}
        self._begun: tuple[str, ...] = ()
        self._weight = self._constant(0.0)
        self._applied: list[Tensor] = []
        self._judgement: Judgement | None = None

    @classmethod
    def build(
        cls,
        workload: Workload,
        strategy: Strategy,
        *,
        device: torch.device | None = None,
        cuts: Cuts | None = None,
        allocating: Allocating = nullcontext,
    ) -> Program:
        """Build the model, its engine and its optimizer on every worker of the default process group.

        Args:
            workload: the workload to train.
            strategy: how it is split.
            device: the device that this worker computes on. None selects `mesh.default_device`.
            cuts: cut points of the model's graph, see `build_engine`.
            allocating: see `Mesh`.

        Raises:
            StrategyError: the degrees do not fit the workers, the batch or the model.
            WorkloadError: the model cannot be built or trained.
            DataError: the data differs between workers.
        """
        check_turns(workload, strategy)
        check_local(workload, strategy)
        strategy = in_one_batch(workload, strategy).for_batch(workload.batch_size)
        mesh = Mesh.build(strategy, device, allocating)
        check_same_data(workload, mesh)
        together = mesh.of_replica()
        own = workload
        if strategy.local:  # its engine knows the workers of one replica alone, which share a batch of their own
            own = replace(workload, batch_size=strategy.batch_of(mesh.coordinate("dp"), workload.batch_size))
        return cls(workload, mesh, together, build_engine(own, together.strategy, together, cuts))

    def loader(
        self,
        dataset: Any = None,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        microbatches: int | None = None,
    ) -> Loader:
        """Create a loader of our replica's shares of `dataset`.

        Arguments left out come from the workload and the strategy. Without `shuffle` all samples come in their own
        order, whatever the workload's `loading` says.
        """
        loading = self.workload.loading
        return Loader(
            dataset=self.workload.dataset if dataset is None else dataset,
            batch_size=batch_size or self.workload.batch_size,
            collate=self.workload.collate,
            seed=self.workload.seed,
            loading=loading if shuffle else Loading(shuffle=False, processes=loading.processes),
            replica=self.mesh.replica,
            parts=self.strategy.parts,
            microbatches=microbatches or self.strategy.microbatches,
            uniform=self.engine.uniform,
            enter=die_with_parent,
        )

    def step(self, batch: Any) -> Tensor:
        """Run one optimizer step on a global batch, equal on all workers. Returns the global mean loss, 0-d."""
        return self.step_share(share_of(batch, self.loader()))

    def step_share(self, share: Share) -> Tensor:
        """Run one optimizer step on a global batch of which `share` holds our samples.

        Returns the global mean loss, 0-d.
        """
        scales = self._own_scales(share) if self.strategy.stale else self._scales(share)
        self._forget_gradients()
        self.engine.position.step = self.steps
        taken: dict[int, _TakenTurn] = {}
        for turn in range(len(self._update.turns)):
            if not self.workload.turns or self.workload.turns[turn].is_due(self.steps):
                take = self._take_alone if self.strategy.stale else self._take_turn
                take = self._take_delayed if self.strategy.delayed else take
                taken[turn] = take(turn, share, scales)
                self.midway |= taken[turn].applied
        self._note(taken)
        self.midway = False
        self.steps += 1
        if self._local is not None and taken:
            self._local.after_step(self.steps, self._weight, next(iter(taken.values())).report[3])
        watch.beat()
        return _sum([each.report[0] for each in taken.values()])

    def _take_turn(self, turn: int, share: Share, scales: Sequence[Tensor]) -> _TakenTurn:
        """Update the parameters of a turn of a step; without turns, all parameters in the only one."""
        self.engine.position.turn = turn
        judgement, names, norm = self._judgement, self._members[turn], None
        if judgement is not None:
            judgement.begin()
        loss = self.engine.forward_backward(share, scales)
        clipped = self.workload.clip_norm is not None
        mine = {name: each for name, each in self.engine.parameters.items() if name in names}
        gradients = local_gradients(mine) if (clipped or judgement) and self._served is None else {}
        square = self._squared_norm(gradients) if self._served is None else self._joined(loss, self.optimizer)
        report, own, pending = self._sum_report(self._report(loss, square))
        together = clipped and not self._whole_everywhere
        if pending is not None and (together or judgement or self.engine.unused):
            pending()
        if self.engine.unused:
            self._forget_unused(own)
        if clipped:
            norm = (own[1] if together else square).sqrt()
        applied = judgement is None or judgement.accepts(share, scales, report)
        if self._served is not None:
            limit = self.workload.clip_norm
            factor = None if limit is None or norm is None else float(clip_factor(norm, limit))
            self._served.settle(applied=applied, factor=factor)
        elif applied:
            if self.workload.clip_norm is not None and norm is not None:
                clip(list(gradients.values()), norm, self.workload.clip_norm)
            self._update.step(turn)
            self._after_step(names)
        if pending is not None:
            pending()  # it ran in parallel with the optimizer
        return _TakenTurn(report, dict(zip(self.engine.losses, report[self._facts :], strict=True)), norm, applied)

    def _joined(self, loss: Tensor, optimizer: torch.optim.Optimizer | None) -> Tensor:
        """Join the gradients of all workers on the servers, for an update of `optimizer`. Returns the squared norm."""
        assert self._served is not None
        if optimizer is not None:
            self._served.forget(optimizer)
        square = self._served.join([float(loss), *(float(x) for x in self.engine.losses.values())], optimizer)
        return torch.tensor(square, dtype=torch.float64, device=self.mesh.device)

    def _take_alone(self, turn: int, share: Share, scales: Sequence[Tensor]) -> _TakenTurn:
        """Give the gradient of our own samples to the servers, and go on with the parameters as they are then.

        Loss and gradient are means over our own samples; their weight is the total weight of these. Clipping and the
        decision on the update are about our gradient alone.
        """
        assert self._served is not None
        judgement, norm, clipped = self._judgement, None, self.workload.clip_norm
        stop: int | str = 0
        if judgement is not None:
            judgement.begin()
        loss = self.engine.forward_backward(share, scales)
        gradients = {n: g.coalesce() if g.is_sparse else g for n, g in local_gradients(self.engine.parameters).items()}
        values = {name: each._values() if each.is_sparse else each for name, each in gradients.items()}
        torch._foreach_div_(list(values.values()), self.strategy.replicas)  # by which the engine multiplied the loss
        square = squared_norm(values, self.engine.held, self.mesh.device) * self.strategy.replicas
        report = self._report(loss, square)
        applied = True
        try:
            applied = judgement is None or judgement.accepts(share, scales, report)
        except NotFinite as error:
            applied, stop = False, str(error)
        if clipped is not None:
            norm = square.sqrt()
            clip(list(values.values()), norm, clipped)
        self._served.forget(self.optimizer)
        weight = float(torch.stack(self._weights(share)).sum()) if applied else 0.0
        own = [float(each) for each in (report[0], *report[3:])]
        mean = self._served.give(gradients if applied else {}, own, weight, self.optimizer, stop or requested())
        report[0] = mean[0]
        names = self.engine.losses
        return _TakenTurn(
            report, {n: report.new_tensor(x) for n, x in zip(names, mean[1:], strict=True)}, norm, applied
        )

    def _take_delayed(self, turn: int, share: Share, scales: Sequence[Tensor]) -> _TakenTurn:
        """Run a step of a pipeline that does not wait for its end, and update by the gradient of the step before.

        The numbers of a turn are those of the step before, too: nothing else is known on all workers without waiting.
        The first step has no update, and its own numbers.
        """
        assert self._delayed is not None
        streamed: Any = self.engine
        before, judgement, limit = self._delayed.last, self._judgement, self.workload.clip_norm
        gradients: dict[str, Tensor] = {}
        begun: list[tuple[Tensor, Tensor, Callable[[], None] | None]] = []

        def complete() -> None:
            if before is not None:
                if limit is not None or judgement is not None:
                    gradients.update(local_gradients(self.engine.parameters))
                square = self._squared_norm(gradients)
                begun.append(self._sum_report(self._report(before.loss, square, before.losses)))

        if judgement is not None:
            judgement.begin()
        loss = streamed.advance(share, scales, complete)
        self._delayed.last = now = TakenStep(loss, dict(self.engine.losses), share, scales)
        if before is None:
            begun.append(self._sum_report(self._report(loss, self._constant(0.0))))
        report, _, pending = begun[0]
        if pending is not None:
            pending()
        norm = report[1].sqrt() if limit is not None and before is not None else None
        applied = True
        if before is not None and judgement is not None:
            applied = judgement.accepts(before.share, before.scales, report)
        streamed.stream.versions.advance()
        if applied and before is not None:
            if limit is not None and norm is not None:
                clip(list(gradients.values()), norm, limit)
            self._update.step(turn)
            self._after_step(self._members[turn])
        names = (now if before is None else before).losses
        return _TakenTurn(report, dict(zip(names, report[self._facts :], strict=True)), norm, applied)

    def told_to_stop(self) -> int:
        """Return the signal on which workers of different steps stop at this one; 0 if they go on.

        Raises:
            NotFinite: they stop because a loss or a gradient of one is not finite.
        """
        return 0 if self._served is None else self._served.check_stop()

    def meet(self) -> None:
        """Let workers of different steps wait for each other, so that all have the same parameters. Collective.

        Stages that do not wait for the end of a step take its last backward passes.
        """
        if self.strategy.stale and self._served is not None:
            regroup.before_meeting()
            self._served.meet()
        if self._delayed is not None:
            self._delayed.stream.drain()

    @property
    def clock(self) -> int:
        """Return the number of contributions that this worker has given to parameter servers; 0 without them."""
        return 0 if self._served is None else self._served.clock

    @property
    def left_out(self) -> int:
        """Return the contributions that this worker has left out, because it was away while the others went on."""
        return 0 if self._served is None else self._served.left_out

    def numbers(self) -> dict[str, Any]:
        """Return the numbers of the optimizer's groups and of the schedule on this worker alone, JSON-able."""
        return self._update.numbers()

    def go_on(self, steps: int, numbers: Mapping[str, Any], further: int) -> None:
        """Go on after `steps` steps with the result of `numbers`, and `further` steps that it does not have."""
        self.steps = steps + further
        self._update.load_numbers(numbers)
        for _ in range(further):
            self._update.schedule.after_step()

    def parameters_written(self) -> None:
        """Take over parameters that were written from outside, equally on all workers. Collective."""
        if self._served is not None:
            self._served.write()

    def _note(self, taken: Mapping[int, _TakenTurn]) -> None:
        """Note what the turns of a step gave, by their numbers, and do what follows all updates of a step."""
        applied = {turn: each for turn, each in taken.items() if each.applied}
        if applied:
            self._update.schedule.after_step()
            if self._average is not None:
                self._average.update(frozenset().union(*(self._members[turn] for turn in applied)))
            self._applied = [each.report for each in applied.values()]
        norms = [each.norm for each in taken.values() if each.norm is not None]
        if norms:
            self.gradient_norm = _sum([norm.square() for norm in norms]).sqrt() if norms[1:] else norms[0]
        if self.workload.turns:
            self.losses = losses_of_turns(self.workload.name, {turn: each.losses for turn, each in taken.items()})
        else:
            self.losses = taken[0].losses

    @contextmanager
    def tried(self, share: Share, samples: int, *, exact: bool = True) -> Iterator[Tensor]:
        """Compute loss and gradient of the first `samples` samples of a global batch, and apply no update. Collective.

        Each turn of the step computes from the same weights, and all are taken. Yields the loss, 0-d; inside the block
        `gradient_pieces` returns the gradient. Afterwards everything that a pass changes is as before.
        With `exact` replicas join gradients exactly; else as the strategy says, and errors of compression stay.
        """
        self.meet()
        self._forget_gradients()
        self.engine.position.step = self.steps
        before, self.engine.position.exact = self.engine.position.exact, exact
        with passes_undone(self.workload, self.engine.module, buffers_of(self.engine)):
            scales = self._scales(share, samples)
            value = _sum([self._try_turn(turn, share, scales) for turn in range(len(self._update.turns))])
            self.engine.position.exact = before
            yield value
        self._forget_gradients()

    def _try_turn(self, turn: int, share: Share, scales: Sequence[Tensor]) -> Tensor:
        """Compute loss and gradient of a turn, and apply no update. Returns the loss, 0-d."""
        self.engine.position.turn = turn
        loss = self.engine.forward_backward(share, scales)
        if self._served is not None:
            self._joined(loss, None)
            self._served.settle(applied=False)
        report, own, pending = self._sum_report(self._report(loss, self._constant(0.0)))
        if pending is not None:
            pending()
        if self.engine.unused:
            self._forget_unused(own)
        if self._local is not None:
            mine = {
                name: self.engine.parameters[name] for name in self.engine.parameters if name in self._members[turn]
            }
            self._local.average_gradients(mine, self._weight, report[3])
        return report[0]

    def next_epoch(self, values: Mapping[str, float | None] | None = None) -> None:
        """Move a schedule that moves by epochs or by a metric, after an epoch.

        Args:
            values: result of `evaluate` after the epoch. Required for `schedule_every="metric"`.
        """
        self._update.schedule.after_epoch(values or {})

    @property
    def judged(self) -> int:
        """Return the number of the step, from 1, that is judged within a step, see `ask_before_update`."""
        return self.steps + (0 if self.strategy.delayed else 1)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, one line each."""
        return (*self.engine.notes, *self._update.notes, *self._begun)

    def ask_before_update(self, judge: Judge | None) -> None:
        """Ask `judge` from now on whether to apply the update of a step.

        None applies all updates without waiting for a decision.
        """
        alone = self.strategy.stale
        settle = None if self._delayed is None else self._delayed.stream.drain
        self._judgement = (
            None if judge is None else Judgement(self.engine, self.mesh, judge, alone=alone, settle=settle)
        )

    def is_finite(self) -> bool:
        """Return whether all parameters, and loss and gradient of the last update, are finite. Collective.

        A step that ended between its turns counts as not finite.
        """
        self.meet()
        parameters = local_tensors(self.engine.parameters)
        broken = parameter_fault(parameters, self.mesh.rank) is not None
        broken |= self.midway or not all(bool(report.isfinite().all()) for report in self._applied)
        return not (broken if self.mesh.world is None else anywhere([broken], self.mesh.world, self.mesh.device)[0])

    def evaluate(self, numbers: Iterable[int] | None = None) -> dict[str, float]:
        """Compute loss and metric over the held-out samples, each counted once; equal on all workers.

        Args:
            numbers: numbers of the workload's evaluations to make; None: all.

        Returns:
            {"loss": ..., metric name: ...} of the first evaluation, {"<name>/loss": ..., ...} of each further one; an
            empty dict for a workload without evaluation.
        """
        self.meet()
        found: dict[str, float] = {}
        with self.averaged():
            for number in range(len(self.workload.evaluations)) if numbers is None else numbers:
                keys = values_of(self.workload.evaluations, number)
                found.update(zip((value.key for value in keys), self._evaluate(number), strict=True))
        return found

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Give the parameters the values of their moving average inside the block, if the workload has one.

        Of replicas that take local steps they have the mean, and their buffers as well.
        """
        with ExitStack() as stack:
            if self._average is not None:
                stack.enter_context(self._average.in_place())
            stack.enter_context(self.at_means())
            yield

    def at_means(self) -> AbstractContextManager[None]:
        """Give the parameters of replicas that take local steps their means inside the block, and buffers as well."""
        return nullcontext() if self._local is None else self._local.averaged()

    def _evaluate(self, number: int) -> tuple[float, float]:
        """Return the loss and the metric of one evaluation."""
        evaluation = self.workload.evaluations[number]
        collected = Collected(evaluation, self.workload, self.mesh) if evaluation.collects else None
        size = evaluation.batch_size or self.workload.batch_size
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.mesh.device)
        for share in self.loader(evaluation.dataset, batch_size=size, shuffle=False).shares(0):
            for microbatch, weight in zip(share.microbatches, self._weights(share), strict=True):
                weights = torch.stack([weight, self._constant(float(microbatch.samples))])
                evaluated = self.engine.evaluate(microbatch, number)
                sums[0] += (evaluated.values * weights).where(weights > 0, 0)
                sums[1] += weights
                if collected is not None:
                    collected.update(evaluated, microbatch.samples)
            watch.beat()
        # the workers of one replica hold parts of one value, but each of them has counted the replica's full weight
        sums[1] /= self.strategy.workers // self.strategy.replicas
        if collected is not None:
            sums[:, 1] = torch.tensor([collected.value(), 1 / self.strategy.workers], dtype=sums.dtype)
        if self.mesh.world is not None:
            dist.all_reduce(sums, group=self.mesh.world)
        loss, metric = (sums[0] / sums[1]).tolist()
        return loss, metric

    def pieces(self) -> list[TensorPiece]:
        """Return this worker's part of the model (`model/<name>`), its average and the optimizer state so far.

        Of replicas that take local steps it is this one's, and `outer/<name>/...` is the state of the outer optimizer.
        Under a strategy that compresses gradients also what is owed to them; then the call is collective.
        """
        outer = [] if self._local is None else self._local.outer_pieces()
        return [*self._of_first(self._pieces()), *outer]

    def means(self, pieces: Sequence[TensorPiece]) -> Sequence[TensorPiece]:
        """Return the means of pieces over replicas that take local steps, on the CPU; without them the pieces."""
        return pieces if self._local is None else self._local.mean_pieces(pieces)

    def _pieces(self) -> list[TensorPiece]:
        self.meet()
        self._update.mirror()
        average = [] if self._average is None else self._average.pieces(self.engine.held)
        delayed = [] if self._delayed is None else self._delayed.pieces()
        return self._model_pieces() + average + delayed + self._owed.pieces() + self._update.state.pieces()

    def model_pieces(self) -> list[TensorPiece]:
        """Return this worker's part of the model alone, see `pieces`; stages do not wait for each other."""
        if self.strategy.stale:
            self.meet()
        return list(self._of_first(self._model_pieces()))

    def _model_pieces(self) -> list[TensorPiece]:
        return [
            TensorPiece(f"model/{name}", local(held.tensor), held.layout, held.writes)
            for name, held in self.engine.held.items()
        ]

    def _of_first(self, pieces: Iterable[TensorPiece]) -> list[TensorPiece]:
        """Return the pieces, which of replicas that take local steps only the first one writes."""
        first = self._local is None or self.mesh.coordinate("dp") == 0
        return [piece if first else replace(piece, writes=False) for piece in pieces]

    def saved_pieces(self) -> list[TensorPiece]:
        """Return the pieces that a checkpoint stores.

        Of replicas that take local steps they are the means, under the usual names, and `replica/<index>/<name>` of
        each. Averages that are on their way are merged first.
        """
        if self._local is None:
            return self.pieces()
        self._local.settle()
        mine, index = self._pieces(), self.mesh.coordinate("dp")
        own = [replace(piece, name=f"{REPLICA}{index}/{piece.name}") for piece in mine]
        return [*self._local.mean_pieces(mine), *own, *self._local.outer_pieces()]

    def held_bytes(self) -> dict[str, int]:
        """Return the bytes that parameters (with buffers), gradients and optimizer state take on this worker's device.

        What compression keeps counts as optimizer state.
        Gradients are there after a step, until the next one begins. Pipelines that do not wait for the end of a step
        have two versions of both.
        """
        weights, pending = ([], []) if self._delayed is None else self._delayed.stream.versions.tensors()
        found = {
            "parameters": [*(local(held.tensor) for held in self.engine.held.values()), *weights],
            "gradients": [*local_gradients(self.engine.parameters).values(), *pending],
            "optimizer": [
                *self._update.state.tensors(),
                *self.compression_state(),
                *([] if self._local is None else self._local.tensors()),
            ],
        }
        return {name: _bytes_on(tensors, self.mesh.device) for name, tensors in found.items()}

    def compression_state(self) -> list[Tensor]:
        """Return what compression of gradients keeps from step to step; it is empty at first."""
        joining = self.engine.joining
        return [] if joining is None or joining.compressed is None else joining.compressed.tensors()

    def optimizer_piece(
        self, parameter: str, state: str, global_shape: Sequence[int], dtype: torch.dtype
    ) -> TensorPiece | None:
        """Return the piece of one entry of the optimizer state to load into, created with zeros if it does not exist.

        Returns None if this worker does not update the parameter. Raises CheckpointError, see `OptimizerState.piece`.
        """
        return self._update.state.piece(parameter, state, global_shape, dtype)

    def gradient_pieces(self) -> list[TensorPiece]:
        """Return the gradients `gradient/<name>` of the last step, after clipping. Unused parameters have none."""
        if self._served is not None:
            self._served.show_gradients()
        found = local_gradients(self.engine.parameters)
        gradients = {name: each.to_dense() if each.is_sparse else each for name, each in found.items()}
        held = self.engine.held
        return self._of_first(
            TensorPiece(f"gradient/{n}", g, held[n].layout, held[n].writes) for n, g in gradients.items()
        )

    def state(self) -> dict[str, Any]:
        """Return the completed steps, the scheduler's counters and the optimizer's numbers, JSON-able. Collective."""
        self.meet()
        average = {} if self._average is None else {"averaged": self._average.begun}
        apart = {} if self._local is None else {LOCAL: self._local.counts()}
        apart |= {} if self._delayed is None else {GRADIENT: self._delayed.counts()}
        return {"steps": self.steps, **average, **apart, **self._update.counts()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continue from the result of `state`, under any strategy.

        Raises CheckpointError, see `ParameterUpdate.load_counts`. Read the tensors first.
        """
        self.steps = int(state["steps"])
        if self._average is not None:
            self._average.begun = bool(state["averaged"])
        self._update.load_counts(state)
        self._owed.load()
        self._begun = _unlike_before(state.get(LOCAL, {}), self.strategy)
        if self._delayed is not None:
            self._delayed.load(state.get(GRADIENT, {}))
        elif state.get(GRADIENT):
            self._begun += ("the gradient of the last step in the checkpoint, which no update has used, is not used",)
        if self._local is not None:
            self._local.load_counts(state.get(LOCAL, {}), exactly=self.replica_in(state) is not None)

    def replica_in(self, state: Mapping[str, Any]) -> int | None:
        """Return the index of the replica whose own tensors this worker reads from a checkpoint with this state.

        Returns None if it reads the means: the checkpoint, or this program, has other replicas or takes no local steps.
        """
        there = state.get(LOCAL, {}).get("replicas")
        return self.mesh.coordinate("dp") if self._local is not None and there == self.strategy.dp else None

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """Gather the plain weights and buffers under all their names, on the CPU of worker 0.

        Returns None elsewhere.
        """
        self.meet()
        pieces = self._of_first(
            TensorPiece(name, local(held.tensor), held.layout, held.writes) for name, held in self.engine.held.items()
        )
        full = gather_full(pieces, self.mesh.world, self.mesh.device)
        if full is None:
            return None
        return full | {alias: full[name] for alias, name in self.engine.aliases.items()}

    def _is_whole_everywhere(self) -> bool:
        """Return whether all workers hold all gradients whole, so that each can compute their norm alone."""
        world = self._together.world
        if world is None:
            return True
        held = [self.engine.held[name].holders for name in self.engine.parameters]
        parts = any(holders != self._together.strategy.workers for holders in held)
        return not anywhere([parts], world, self.mesh.device)[0]

    def _forget_gradients(self) -> None:
        for parameter in self.engine.parameters.values():
            parameter.grad = None

    def _scales(self, share: Share, samples: int | None = None) -> list[Tensor]:
        """Compute the factor of each microbatch's loss, 0-d: its weight divided by the total weight of all replicas.

        Only microbatches within the first `samples` samples of the batch count. None counts all.
        """
        limit = share.samples if samples is None else samples
        counts = [samples is None or each.first + each.samples <= limit for each in share.microbatches]
        if self.workload.weight is None:
            total_samples = self._samples_together(share.samples, limit) if self.strategy.local else limit
            self._weight = self._constant(float(total_samples))
            pairs = zip(share.microbatches, counts, strict=True)
            return [self._constant(each.samples * counted / max(total_samples, 1)) for each, counted in pairs]
        weights = torch.stack(self._weights(share))
        if samples is not None:
            weights = weights.where(torch.tensor(counts, device=self.mesh.device), 0)
        total = weights.sum()
        if self._together.replica_group is not None:
            dist.all_reduce(total, group=self._together.replica_group)
        self._weight = total.clamp(min=0)
        return list((weights / total).where(~(total <= 0), 0).unbind())  # nan stays nan

    def _samples_together(self, samples: int, limit: int) -> int:
        """Return how many of a batch's samples fall to the workers that take local steps with this one.

        Only cells within the first `limit` samples count.
        """
        strategy = self.strategy
        rows = cut_batch(samples, strategy.parts, strategy.microbatches, uniform=self.engine.uniform)
        first = self.mesh.coordinate("dp") * strategy.fsdp
        cells = (cell for row in rows for cell in row[first : first + strategy.fsdp])
        return sum(len(cell) for cell in cells if cell.stop <= limit)

    def _own_scales(self, share: Share) -> list[Tensor]:
        """Compute the factor of each microbatch's loss, 0-d: its weight divided by the total weight of this replica."""
        own = torch.stack(self._weights(share))
        return list((own / own.sum()).where(~(own.sum() <= 0), 0).unbind())

    def _weights(self, share: Share) -> list[Tensor]:
        """Return the weight of each microbatch, 0-d float64: its number of samples, or the workload's own weight."""
        weigh = self.workload.weight
        return [
            self._constant(float(microbatch.samples))
            if weigh is None or not microbatch.samples
            else self._number(weigh(microbatch.data))
            for microbatch in share.microbatches
        ]

    def _number(self, weight: Any) -> Tensor:
        number = torch.as_tensor(weight, dtype=torch.float64, device=self.mesh.device)
        if number.numel() != 1:
            raise WorkloadError(
                f"weight of workload {self.workload.name!r} has shape {tuple(number.shape)}: must be one number, what "
                "the loss of the batch averages over"
            )
        return number.reshape(())

    def _constant(self, value: float) -> Tensor:
        """Return a cached number on our device: a training run uses few of them, and copying one there costs time."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(value, dtype=torch.float64, device=self.mesh.device)
        return self._constants[value]

    def _squared_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Compute this worker's part of the squared norm, or all of it if every worker holds whole gradients."""
        if not gradients:
            return self._constant(0.0)
        square = squared_norm(gradients, self.engine.held, self.mesh.device)
        return square * self._together.strategy.workers if self._whole_everywhere else square

    def _report(self, loss: Tensor, square: Tensor, parts: Mapping[str, Tensor] | None = None) -> Tensor:
        """Stack the numbers that all workers sum in one message: loss, squared norm, unused parameters (1 or 0).

        The weight of a replica that takes local steps follows, by which its losses are multiplied; then several losses
        one by one: `parts`, or those of the engine.
        """
        unused = self._constant(float(bool(self.engine.unused)))
        own = self.engine.losses if parts is None else parts
        losses = [loss.double(), *(each.double() for each in own.values())]
        weight = []
        if self._local is not None:
            losses = [each * self._weight for each in losses]
            weight = [self._weight / self._together.strategy.workers]
        return torch.stack([losses[0], square.double(), unused, *weight, *losses[1:]])

    @property
    def _facts(self) -> int:
        """Return the number of entries of a report before several losses."""
        return 3 if self._local is None else 4

    def _sum_report(self, report: Tensor) -> tuple[Tensor, Tensor, Callable[[], None] | None]:
        """Begin to sum a report over all workers.

        Returns:
            the report, whose sums are there once the function has been called (None: they are there); and the sums
            over the workers that update their parameters together.
        """
        together, local = self._together.world, self._local is not None
        if local and together is not None:
            dist.all_reduce(report, group=together)
        own = report.clone() if local else report
        group = self.mesh.group("dp") if local else self.mesh.world
        if group is None:
            return report, own, None
        handle = dist.all_reduce(report, group=group, async_op=True)
        done = False

        def wait() -> None:
            nonlocal done
            handle.wait()
            if local and not done:  # sums of weighted losses become means
                total = report[3].clone()
                for losses in (report[:1], report[4:]):
                    losses.copy_((losses / total).where(~(total <= 0), 0))
            done = True

        return report, own, wait

    def _forget_unused(self, report: Tensor) -> None:
        """Remove the zero gradients of parameters that no replica used, so that the optimizer skips them.

        Called on workers that left some unused. A parameter can be unused everywhere only if all workers did, and
        `report` tells them so: the sums over the workers that update their parameters together.
        """
        group = self._together.replica_group
        if group is None or not self._by_all(report[2]):
            return
        unused = set(self.engine.unused)
        used = anywhere([name not in unused for name in self.engine.parameters], group, self.mesh.device)
        for parameter, by_any in zip(self.engine.parameters.values(), used, strict=True):
            if not by_any:
                parameter.grad = None

    def _by_all(self, count: Tensor) -> bool:
        """Return whether `count` equals the number of workers that update their parameters together."""
        return int(count) == self._together.strategy.workers


def _unlike_before(saved: Mapping[str, Any], strategy: Strategy) -> tuple[str, ...]:
    """Return what a training does not take over from a checkpoint of local steps, one line each.

    Args:
        saved: numbers of local steps in the checkpoint; empty if it has none.
        strategy: how the training goes on.
    """
    notes = []
    there = saved.get("replicas")
    if there is not None and (not strategy.local or there != strategy.dp):
        goes_on = f"each of the {strategy.dp} replicas goes on" if strategy.local else "the training goes on"
        notes.append(f"the checkpoint has {there} replicas that took local steps: {goes_on} from their mean")
    before, now = saved.get("outer"), strategy.outer if strategy.local else ""
    if before == "nesterov" and now != before:
        notes.append("the momentum of the outer optimizer in the checkpoint is not used")
    if now == "nesterov" and before != now:
        notes.append("the checkpoint has no outer optimizer: it begins here, without momentum")
    return tuple(notes)


def _bytes_on(tensors: Iterable[Tensor], device: torch.device) -> int:
    """Return the bytes that tensors take on a device; memory that several share counts once."""
    blocks = {each.untyped_storage().data_ptr(): each.untyped_storage() for each in tensors if each.device == device}
    return sum(block.nbytes() for block in blocks.values())


def _sum(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of 0-d tensors; the tensor itself if it is the only one."""
    return values[0] if len(values) == 1 else torch.stack(list(values)).sum()
