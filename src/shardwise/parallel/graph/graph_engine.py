"""Run the traced graph of a module, cut over workers: tp, pp, and their products with dp and fsdp.

    trace the step -> each worker's part of every operation (`tensor`) -> cut into stages and blocks (`divide`)
        -> modules that hold this worker's tensors (`parameters`) -> executed by `executor`

A graph has fixed shapes. The last small batch of an epoch and the evaluation therefore have graphs of their own, cut at
the same points.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.errors import StrategyError
from shardwise.options import BF16
from shardwise.parallel.compiling.regions import write_elsewhere
from shardwise.parallel.data.joining import joining_of
from shardwise.parallel.engine import Evaluated, Position
from shardwise.parallel.faults import Fault, gradient_fault, passes_of
from shardwise.parallel.graph.graph_faults import Watched
from shardwise.parallel.graph.kept_model import KeptModel
from shardwise.parallel.graph.loss_pieces import cut_loss
from shardwise.parallel.graph.parameters import LocalStages
from shardwise.parallel.graph.trace import traced
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.operators.graph_operators import GraphOperators
from shardwise.parallel.operators.module_patches import DRAWN
from shardwise.parallel.optim.clipping import local_gradients
from shardwise.parallel.pipeline.channels import open_channels
from shardwise.parallel.pipeline.divide import divide
from shardwise.parallel.pipeline.executor import MOST_STAGES, PipelineExecutor, PipelinePass
from shardwise.parallel.pipeline.stage import StepWork, prepare
from shardwise.parallel.pipeline.stream import PipelineStream, StreamedMicrobatch, tied_stages
from shardwise.parallel.pipeline.weight_gradients import WeightGradients, defer_weights
from shardwise.parallel.pipeline.weight_versions import WeightVersions
from shardwise.parallel.state.buffers import ReplicaBuffers
from shardwise.parallel.state.build_model import aliases_of, build_model, persistent_buffers, trained_of
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.parallel.state.materialize import move_values
from shardwise.parallel.state.parameter_hooks import ParameterHooks, check_hooks, take_hooks
from shardwise.parallel.tensor.communication import Exchange
from shardwise.parallel.tensor.overlap import overlap
from shardwise.parallel.tensor.partition import partition
from shardwise.parallel.tensor.partitioner import LocalGraph, Replacements
from shardwise.parallel.tensor.placement import Sharded
from shardwise.splitting.balance import Cuts, cuts_blocks
from shardwise.splitting.schedule import Action, order
from shardwise.strategy import Strategy
from shardwise.workload.data import Microbatch, Share
from shardwise.workload.precision import Copies, kept_of
from shardwise.workload.pytree import to_device
from shardwise.workload.trace.graph import StepGraph, batch_leaves, example
from shardwise.workload.weight_files import weights_of
from shardwise.workload.workload import Workload

WORTH_A_NOTE = 0.01
"""Smallest share of the parameters (0 to 1) that is worth a note if it is not sharded."""

Key = tuple[Any, ...]
"""Cache key of a graph: number of the evaluation or TRAINING, shapes and dtypes of the batch."""

TRAINING = -1
"""In place of the number of an evaluation."""


class GraphEngine:
    """Engine that runs a traced graph; see the module's docstring, and `engine.Engine` for the attributes.

    Attributes:
        division: the cut points of the step, which make stages and blocks.
        stream: the steps of a pipeline that does not wait for their ends; None for other schedules.

    Raises:
        WorkloadError: the step cannot be traced.
        StrategyError: the strategy cannot work for this module.
    """

    unused: Sequence[str] = ()

    def __init__(self, workload: Workload, strategy: Strategy, mesh: Mesh, cuts: Cuts | None = None) -> None:
        self._connect(workload, strategy, mesh)
        model, data = build_model(workload, mesh), self._example()
        hooks = take_hooks(model)
        check_hooks(hooks, replaced=True)
        named = dict(model.named_parameters())
        tensors: dict[str, Tensor] = {**named, **persistent_buffers(model)}
        local, evaluation = self._shard(model, named, data)
        works = self._cut(local, evaluation, tensors, data, cuts)
        self._hold(works, tensors, model)
        self._hooks = ParameterHooks(hooks, self.held, mesh)
        self._describe(local, named)

    # ---- the steps of building --------------------------------------------------------------------------------------

    def _connect(self, workload: Workload, strategy: Strategy, mesh: Mesh) -> None:
        """Make the operations that talk to other workers or depend on the position in the batch."""
        precision = strategy.precision_of(workload.precision)
        self._workload, self._strategy, self._mesh = replace(workload, precision=precision), strategy, mesh
        self.position = Position(seed=workload.seed)
        self.uniform = strategy.pp > 1
        self.averages, self.joining = strategy.splits_parameters, joining_of(mesh, self.position)
        self._exchange = Exchange(mesh.group("tp"), mesh.coordinate("tp"), strategy.tp)
        self._operators = GraphOperators(
            self.position,
            self._exchange,
            mesh.replica_group,
            gradient_factor=strategy.replicas if strategy.splits_parameters else 1,
        )
        self._weights = WeightGradients()
        self._operators.precision, self._operators.float32 = precision, workload.float32
        self._copies = Copies()
        self.losses: dict[str, Tensor] = {}

    def _shard(
        self, model: nn.Module, named: Mapping[str, nn.Parameter], data: Any
    ) -> tuple[LocalGraph, LocalGraph | None]:
        """Trace the step and shard its layers. Return this worker's graphs of training and, if needed, evaluation."""
        self.aliases, self.trained = aliases_of(model), trained_of(model)
        self._parameters = frozenset(named)
        self._trained = frozenset(self.trained)
        self._kept = kept_of(self._workload.precision, model, self._workload.float32).names
        step = traced(self._workload, model, data)
        self._loss_names = step.losses
        local = self._partition(step, first=True)
        self._placements, self._summed = local.placements, local.summed
        if self.joining is not None:
            whole = self._trained - self._summed if self._strategy.tp > 1 else frozenset()
            cut = {name for name, each in local.placements.items() if isinstance(each, Sharded)}
            self.joining.keep_exact(self._kept | (whole - cut))
        return local, self._evaluation(model, data)

    def _cut(
        self,
        local: LocalGraph,
        evaluation: LocalGraph | None,
        tensors: Mapping[str, Tensor],
        data: Any,
        cuts: Cuts | None,
    ) -> list[StepWork]:
        """Cut the graphs into stages and blocks; return what this worker runs of each."""
        strategy, mesh = self._strategy, self._mesh
        self.division = divide(local.step, local, tensors, data, strategy, mesh, self._parameters, evaluation, cuts)
        self._works: dict[Key, StepWork] = {self._key(TRAINING, data): self._prepare(local)}
        if evaluation is not None:
            self._works[self._key(0, data)] = self._prepare(evaluation)
        return list(self._works.values())

    def _hold(self, works: Sequence[StepWork], tensors: Mapping[str, Tensor], model: nn.Module) -> None:
        """Hold this worker's part of the parameters and buffers, and make the pipeline that runs with them."""
        mesh = self._mesh
        self._local_stages = LocalStages(
            works,
            tensors,
            works[0].local,
            self._strategy,
            mesh,
            self._exchange,
            self._operators,
            self.joining,
            copies=self._copies,
            narrow=self._workload.precision == BF16,
            whole=self._kept,
            weights=weights_of(self._workload.model),
        )
        for each in works:
            for call in each.local.step.opaque:
                call.forget_values()
        self._model = KeptModel(self._workload, model, [call.path for each in works for call in each.local.step.opaque])
        self.parameters: dict[str, nn.Parameter] = self._local_stages.trained(self._trained)
        self.held: dict[str, TensorPlacement] = self._local_stages.held()
        self._pipeline = PipelineExecutor(
            self._local_stages.stages,
            mesh.coordinate("pp"),
            self._strategy.pp,
            mesh.group("pp"),
            mesh.device,
            self._weights,
            open_channels(works, mesh),
        )
        held = {name: held.tensor for name, held in self.held.items() if not isinstance(held.tensor, nn.Parameter)}
        self._buffers = ReplicaBuffers(held, mesh.replica_group)
        self.stream = self._make_stream() if self._strategy.delayed else None

    def _make_stream(self) -> PipelineStream:
        """Make the two versions of the weights, and the stream of steps. Raises StrategyError for tied parameters."""
        stages = self._local_stages
        if tied := stages.tied:
            raise StrategyError(tied_stages(tied[0]))
        with self._mesh.allocating():
            versions = WeightVersions(self.parameters, stages.slots)
        return PipelineStream(self._pipeline, versions, self._strategy.microbatches, stages.before_backward)

    def _describe(self, local: LocalGraph, named: Mapping[str, nn.Parameter]) -> None:
        """Note what is not sharded, and where the stages begin."""
        self.uncut = local.uncut(named) if self._strategy.tp > 1 else []
        self.cut_points = self.division.cut_points if self._strategy.pp > 1 else None
        self._local_notes = (*local.notes, *(str(each) for each in self.uncut if each.share >= WORTH_A_NOTE))
        self.sharded_parameter_share = local.sharded_share(named)

    def unsplit_layout(self, name: str) -> Layout:
        """Return the layout of a parameter that only `tp` splits, see `Engine.unsplit_layout`."""
        return self._local_stages.unsplit_layout(name)

    def partial_groups(self, name: str) -> Sequence[dist.ProcessGroup]:
        """Return the groups that sum parts of a gradient over `tp` and `pp`, see `Engine.partial_groups`."""
        return self._local_stages.partial_groups(name, self._summed)

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, see `Engine.notes`."""
        drawn = (DRAWN,) if self.draws_other_random_numbers else ()
        return (*self._local_notes, *self._buffers.notes, *drawn)

    @property
    def module(self) -> nn.Module:
        """Return the model without its weights, which holds what is not traced, see `Engine.module`."""
        return self._model.module

    @property
    def draws_other_random_numbers(self) -> bool:
        """Return whether the model drew random numbers that workers do not share, as in `Engine`."""
        return self._operators.draws_other_random_numbers

    @property
    def recomputing(self) -> bool:
        """Return whether a block is being recomputed, see `Engine.recomputing`."""
        return self._operators.recomputing

    # ---- graphs -----------------------------------------------------------------------------------------------------

    def _example(self) -> Any:
        """Return a microbatch with the number of samples that this worker trains on."""
        strategy = self._strategy
        samples = strategy.samples_of(self._mesh.replica, self._workload.batch_size)
        return to_device(example(self._workload, samples), self._mesh.device)

    def _evaluation(self, model: nn.Module, data: Any) -> LocalGraph | None:
        """Return the graph of the first evaluation if the step is cut, because the cut points must exist in both.

        Returns None otherwise.
        """
        cut = self._strategy.pp > 1 or cuts_blocks(self._strategy)
        if not self._workload.evaluations or not cut:
            return None
        return self._partition(traced(self._workload, model, data, training=False), first=False)

    def _key(self, evaluation: int, data: Any) -> Key:
        leaves = batch_leaves(data)
        return evaluation, *((tuple(x.shape), x.dtype) if isinstance(x, Tensor) else x for x in leaves)

    def _partition(self, step: StepGraph, *, first: bool) -> LocalGraph:
        """Build this worker's part of a step. `first` marks the step that decides the placements of tensors."""
        operators = self._operators
        replacements = Replacements(
            operators.dropout, operators.draw, operators.attention, operators.batch_norm, operators.opaque
        )
        local, _ = partition(
            step,
            self._exchange,
            replacements,
            trained=self._trained,
            sequence=bool(self._strategy.sp),
            placements=None if first else self._placements,
            summed=None if first else self._summed,
        )
        cut_loss(local, self._strategy.loss_pieces, operators.loss_in_pieces)
        if self._strategy.schedule == "zero-bubble":
            defer_weights(local.graph, self._weights, step.tensors)
        elif step.training:
            strategy = self._strategy
            overlap(local.graph, step.tensors, direct=bool(strategy.compile), again=strategy.gathers_again)
        if self._strategy.compile:
            write_elsewhere(local.graph)
        return local

    def _prepare(self, local: LocalGraph) -> StepWork:
        division, strategy = self.division, self._strategy
        assert len(division.blocks) < MOST_STAGES
        own = range(self._mesh.coordinate("pp"), len(division.blocks), strategy.pp)
        return prepare(local, division.cut, division.blocks, self._parameters, own, strategy)

    def _work(self, key: Key, data: Any) -> StepWork:
        """Return the work for batches of these shapes, and trace it when they occur for the first time."""
        if key not in self._works:
            model = self._model.built()
            move_values(model, self._mesh.device)
            training = key[0] == TRAINING
            evaluation = 0 if training else key[0]
            step = traced(self._workload, model, data, training=training, evaluation=evaluation)
            step = self._model.adopt(step)
            for call in step.opaque:
                call.forget_values()
            work = self._prepare(self._partition(step, first=False))
            self._local_stages.check(work)
            self._works[key] = work
        return self._works[key]

    def _notice_changes(self) -> None:
        """Forget all graphs if a value in Python that they depend on has been changed since they were traced."""
        if self._model.changed():
            self._works.clear()

    # ---- running ----------------------------------------------------------------------------------------------------

    def forward_backward(self, share: Share, scales: Sequence[Tensor]) -> Tensor:
        """Compute the gradients of a share, see `Engine.forward_backward`."""
        self._notice_changes()
        self._pipeline.parts = []
        with self._copies.anew():
            total = self._pipeline.run(self._pass(share, scales))
        self._join()
        return self._shown(total)

    def _join(self) -> None:
        """Sum the gradients over the workers that contribute to them, and do what follows complete gradients."""
        self._local_stages.reduce(self._summed)
        self._buffers.settle()
        self._hooks.apply(self.trained)

    def _shown(self, total: Tensor) -> Tensor:
        """Note this worker's parts of several losses, and return its part of their sum."""
        shown = float(self._mesh.coordinate("tp") == 0) / self._local_stages.loss_factor
        self.losses = self._losses(total, shown)
        return total * shown

    def advance(self, share: Share, scales: Sequence[Tensor], complete: Callable[[], None]) -> Tensor:
        """Run a step of a pipeline that does not wait for its end, see `PipelineStream.advance`.

        When `complete` is called, `.grad` of `parameters` is the gradient of the step before.
        Returns this worker's part of the loss of this step.
        """
        assert self.stream is not None
        stream, position = self.stream, self.position
        self._notice_changes()
        self._pipeline.parts = []
        batches = [to_device(microbatch.data, self._mesh.device) for microbatch in share.microbatches]
        works = [self._work(self._key(TRAINING, data), data) for data in batches]

        def joined() -> None:
            stream.versions.hand_over()
            self._join()
            complete()

        with self._copies.anew():
            total = stream.advance(
                [
                    StreamedMicrobatch(work, self._given(work, data), scale, partial(position.enter, microbatch))
                    for work, data, scale, microbatch in zip(works, batches, scales, share.microbatches, strict=True)
                ],
                joined,
            )
        return self._shown(total)

    def _losses(self, total: Tensor, factor: float) -> dict[str, Tensor]:
        """Return this worker's part of each loss; zeros on workers without the last stage."""
        names = self._loss_names
        if len(names) == 1:
            return {}
        parts = self._pipeline.parts or [torch.zeros_like(total) for _ in names]
        return {name: part * factor for name, part in zip(names, parts, strict=True)}

    def _pass(self, share: Share, scales: Sequence[Tensor]) -> PipelinePass:
        """Return the microbatches of a share as one pass.

        Replicas may have microbatches of other shapes, and their passes must have the same collectives in one order.
        """
        strategy, microbatches = self._strategy, share.microbatches
        batches = [to_device(microbatch.data, self._mesh.device) for microbatch in microbatches]
        works = [self._work(self._key(TRAINING, data), data) for data in batches]

        def actions(worker: int) -> Sequence[Action]:
            return order(
                strategy.schedule,
                worker,
                strategy.pp,
                strategy.stages_per_worker,
                len(microbatches),
                last_whole=self._local_stages.sharded,
            )

        return PipelinePass(
            works,
            actions(self._mesh.coordinate("pp")),
            actions,
            [self._given(work, data) for work, data in zip(works, batches, strict=True)],
            [scale * self._local_stages.loss_factor for scale in scales],
            enter=lambda number: self.position.enter(microbatches[number]),
            before_backward=lambda action, final: self._local_stages.before_backward(action.stage, final),
        )

    def _given(self, work: StepWork, data: Any) -> dict[str, Any]:
        """Return the batch and the module's constants, by placeholder name."""
        step = work.local.step
        return {**dict(zip(step.leaves, batch_leaves(data), strict=True)), **step.constants}

    @torch.no_grad()
    def find_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find the first value that leaves a module and is not finite, see `Engine.find_fault`."""
        found = []
        self._copies.forget()
        for each in passes_of(share, scales):
            data = to_device(each.microbatch.data, self._mesh.device)
            self.position.enter(each.microbatch)
            watched = Watched(self._work(self._key(TRAINING, data), data), list(self._pipeline.stages))
            results = self._pipeline.evaluate(watched.work, self._given(watched.work, data))
            found.append(watched.fault(each, self._mesh.rank, None if results is None else results[0]))
        self._copies.forget()
        self._local_stages.after_evaluation()
        return min(filter(None, found), default=None)

    def find_gradient_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find a gradient that is not finite, see `Engine.find_gradient_fault`. Replicas have already summed theirs."""
        known = self._mesh.replica_group is None and self._strategy.tp == 1
        later = self._strategy.pp - 1 - self._mesh.coordinate("pp")  # later stages run backward first
        gradients = local_gradients(self.parameters)
        return gradient_fault(gradients, self._mesh.rank if known else -1, later * len(self._placements))

    @torch.no_grad()
    def evaluate(self, microbatch: Microbatch, number: int) -> Evaluated:
        """Compute loss and metric of a microbatch, see `Engine.evaluate`."""
        self._notice_changes()
        data = to_device(microbatch.data, self._mesh.device)
        self.position.enter(microbatch)
        work = self._work(self._key(number, data), data)
        with self._copies.anew():
            results = self._pipeline.evaluate(work, self._given(work, data))
        self._local_stages.after_evaluation()
        values = torch.zeros(2, dtype=torch.float64, device=self._mesh.device)
        if results is None:
            return Evaluated(values)
        rebuild = work.local.step.rebuild
        shown = results[:2] if rebuild is None else results[:1]
        if self._mesh.coordinate("tp") == 0:
            values[: len(shown)] = torch.stack([result.double() for result in shown])
        return Evaluated(values) if rebuild is None else Evaluated(values, True, rebuild(results[1:]), data)
