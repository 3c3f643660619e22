"""The parallel model on this worker: an engine that computes gradients, and what a training step does around it."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from shardwise.errors import WorkloadError
from shardwise.launch import watch
from shardwise.parallel.clipping import clip, local_gradients, local_tensors, squared_norm
from shardwise.parallel.deal import DealtParameters
from shardwise.parallel.engine import Engine
from shardwise.parallel.faults import parameter_fault
from shardwise.parallel.gather import anywhere, gather_full
from shardwise.parallel.judgement import Judge, Judgement
from shardwise.parallel.layout import Piece
from shardwise.parallel.mesh import Allocating, Mesh
from shardwise.parallel.optimizer_state import OptimizerState, load_schedule_state, schedule_state
from shardwise.parallel.planning import Cuts
from shardwise.parallel.rows import local
from shardwise.parallel.same_data import check_same_data
from shardwise.parallel.shards import Shards
from shardwise.strategy import Strategy
from shardwise.workload.data import Loader, Share, share_of
from shardwise.workload.workload import Workload


def build_engine(workload: Workload, strategy: Strategy, mesh: Mesh, cuts: Cuts | None = None) -> Engine:
    """The engine that runs `strategy`: the module as it is, or the parts of its graph. Collective.

    `cuts`: of a graph into stages and blocks; None: as its layers' costs, measured now, say.
    """
    if strategy.tp == strategy.pp == 1:
        from shardwise.parallel.data import ModuleEngine

        return ModuleEngine(workload, strategy, mesh)
    from shardwise.parallel.staged import GraphEngine

    return GraphEngine(workload, strategy, mesh, cuts)


class Program:
    """A workload under a strategy on this worker. Every method but the plain readers is collective.

    Attributes:
        workload: what is trained.
        strategy: how it is split, with the number of microbatches settled.
        mesh: where this worker stands.
        engine: what computes the gradients.
        optimizer: of the parameters that this worker updates; None where zero=1 leaves it none.
        scheduler: of that optimizer's learning rate; None without a schedule.
        steps: optimizer steps done.
        gradient_norm: global norm of the last step's gradient before clipping; None without `clip_norm`.
    """

    def __init__(self, workload: Workload, strategy: Strategy, mesh: Mesh, engine: Engine) -> None:
        self.workload, self.strategy, self.mesh, self.engine = workload, strategy, mesh, engine
        self.steps = 0
        self.gradient_norm: Tensor | None = None
        self._dealt = self._deal()
        names = list(engine.parameters) if self._dealt is None else self._dealt.mine
        updated: dict[str, nn.Parameter] = {name: engine.parameters[name] for name in names}
        self._shards = Shards(updated, workload.optimizer) if updated else None
        self.optimizer = None if self._shards is None else self._shards.optimizer
        self.scheduler: LRScheduler | None = None
        if workload.schedule is not None and self.optimizer is not None:
            self.scheduler = workload.schedule(self.optimizer)
        self._optimizer_state = (
            None
            if self._shards is None
            else OptimizerState(self._shards.optimizer, self._shards.parameters, engine.held, self._written(updated))
        )
        self._whole_everywhere = self._is_whole_everywhere()
        self._constants: dict[float, Tensor] = {}
        self._applied: Tensor | None = None
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
        """Builds the model, its engine and its optimizer on every worker of the default process group.

        Args:
            workload: what is trained.
            strategy: how it is split.
            device: where this worker computes; None: `mesh.default_device`.
            cuts: of the model's graph, see `build_engine`.
            allocating: see `Mesh`.

        Raises:
            StrategyError: the degrees do not fit the workers, the batch or the model.
            WorkloadError: the model cannot be built, or cannot be trained.
            DataError: other workers have other data.
        """
        strategy = strategy.for_batch(workload.batch_size)
        mesh = Mesh.build(strategy, device, allocating)
        check_same_data(workload, mesh)
        return cls(workload, strategy, mesh, build_engine(workload, strategy, mesh, cuts))

    def loader(
        self,
        dataset: Any = None,
        *,
        batch_size: int | None = None,
        shuffle: bool = True,
        microbatches: int | None = None,
    ) -> Loader:
        """Loads our replica's shares of `dataset`; what is not given is the workload's and the strategy's."""
        return Loader(
            dataset=self.workload.dataset if dataset is None else dataset,
            batch_size=batch_size or self.workload.batch_size,
            collate=self.workload.collate,
            seed=self.workload.seed,
            shuffle=shuffle,
            replica=self.mesh.replica,
            parts=self.strategy.parts,
            microbatches=microbatches or self.strategy.microbatches,
            uniform=self.engine.uniform,
        )

    def step(self, batch: Any) -> Tensor:
        """One optimizer step on a global batch, the same on all workers. Returns the global mean loss, 0-d."""
        return self.step_share(share_of(batch, self.loader()))

    def step_share(self, share: Share) -> Tensor:
        """One optimizer step on a global batch of which `share` holds our samples. Returns the global mean loss."""
        judgement, scales = self._judgement, self._scales(share)
        if judgement is not None:
            judgement.begin()
        for parameter in self.engine.parameters.values():
            parameter.grad = None
        self.engine.position.step = self.steps
        loss = self.engine.forward_backward(share, scales)
        clipped = self.workload.clip_norm is not None
        gradients = local_gradients(self.engine.parameters) if clipped or judgement else {}
        square = self._squared_norm(gradients)
        report = self._report(loss, square)
        pending = None if self.mesh.world is None else dist.all_reduce(report, group=self.mesh.world, async_op=True)
        together = clipped and not self._whole_everywhere
        if pending is not None and (together or judgement or self.engine.unused):
            pending.wait()
        if self.engine.unused:
            self._forget_unused(report)
        if clipped:
            self.gradient_norm = (report[1] if together else square).sqrt()
        if judgement is None or judgement.accepts(share, scales, report):
            if self.workload.clip_norm is not None and self.gradient_norm is not None:
                clip(list(gradients.values()), self.gradient_norm, self.workload.clip_norm)
            self._update()
            self._applied = report
        if pending is not None:
            pending.wait()  # it ran beside the optimizer
        self.steps += 1
        watch.beat()
        return report[0]

    def judged_by(self, judge: Judge | None) -> None:
        """Ask `judge` from now on whether the update of a step is applied; None: all are, and nothing waits for it."""
        self._judgement = None if judge is None else Judgement(self.engine, self.mesh, judge)

    def is_finite(self) -> bool:
        """Return whether all parameters are finite, and loss and gradient of the last update. Collective."""
        parameters = local_tensors(self.engine.parameters)
        broken = parameter_fault(parameters, self.mesh.rank) is not None
        broken |= self._applied is not None and not bool(self._applied.isfinite().all())
        return not (broken if self.mesh.world is None else anywhere([broken], self.mesh.world, self.mesh.device)[0])

    def evaluate(self) -> dict[str, float]:
        """Mean loss and metric over the held-out samples, each counted once; the same on all workers.

        Returns {"loss": ..., metric name: ...}; nothing for a workload without evaluation.
        """
        evaluation = self.workload.evaluation
        if evaluation is None:
            return {}
        size = evaluation.batch_size or self.workload.batch_size
        sums = torch.zeros(2, 2, dtype=torch.float64, device=self.mesh.device)
        for share in self.loader(evaluation.dataset, batch_size=size, shuffle=False).shares(0):
            for number, weight in enumerate(self._weights(share)):
                microbatch = share.microbatches[number]
                weights = torch.stack([weight, self._constant(float(microbatch.samples))])
                values = self.engine.evaluate(microbatch).double()
                sums[0] += (values * weights).where(weights > 0, 0)
                sums[1] += weights
            watch.beat()
        # the workers of one replica have parts of one value, but each has counted all of the replica's weight
        sums[1] /= self.strategy.workers // self.strategy.replicas
        if self.mesh.world is not None:
            dist.all_reduce(sums, group=self.mesh.world)
        loss, metric = (sums[0] / sums[1]).tolist()
        return {"loss": loss, evaluation.metric: metric}

    def pieces(self) -> list[Piece]:
        """This worker's part of the model (`model/<name>`) and of the optimizer's state, as far as there is any."""
        model = [
            Piece(f"model/{name}", local(held.tensor), held.layout, held.writes)
            for name, held in self.engine.held.items()
        ]
        return model + ([] if self._optimizer_state is None else self._optimizer_state.pieces())

    def optimizer_piece(
        self, parameter: str, state: str, global_shape: Sequence[int], dtype: torch.dtype
    ) -> Piece | None:
        """The piece of one entry of the optimizer's state, made of zeros if there is none yet: to load into.

        None where this worker does not update the parameter. Raises CheckpointError, see `OptimizerState.piece`.
        """
        if self._optimizer_state is None:
            return None
        return self._optimizer_state.piece(parameter, state, global_shape, dtype)

    def gradient_pieces(self) -> list[Piece]:
        """`gradient/<name>` of the last step, after clipping; parameters that were not used have none."""
        gradients = local_gradients(self.engine.parameters)
        held = self.engine.held
        return [Piece(f"gradient/{n}", g, held[n].layout, held[n].writes) for n, g in gradients.items()]

    def state(self) -> dict[str, Any]:
        """JSON-able: steps done, the scheduler's counts, the learning rates of the optimizer's groups."""
        return {"steps": self.steps, **schedule_state(self.optimizer, self.scheduler)}

    def load_state(self, state: dict[str, Any]) -> None:
        """Continues from what `state` gave, under any strategy. Raises CheckpointError, see `load_schedule_state`."""
        self.steps = int(state["steps"])
        load_schedule_state(self.optimizer, self.scheduler, state)

    def full_state_dict(self) -> dict[str, Tensor] | None:
        """The plain weights and buffers under all their names, on the CPU of worker 0; None elsewhere."""
        pieces = [Piece(name, local(held.tensor), held.layout, held.writes) for name, held in self.engine.held.items()]
        full = gather_full(pieces, self.mesh.world, self.mesh.device)
        if full is None:
            return None
        return full | {alias: full[name] for alias, name in self.engine.aliases.items()}

    def _deal(self) -> DealtParameters | None:
        """With zero=1: which parameters each replica updates."""
        group = self.mesh.replica_group
        if self.strategy.zero != 1 or group is None:
            return None
        return DealtParameters(self.engine.parameters, group)

    def _written(self, updated: dict[str, nn.Parameter]) -> set[str]:
        """Names of the parameters whose optimizer state this worker writes."""
        writes = {name for name in updated if self.engine.held[name].writes}
        if self._dealt is None or not self.engine.parameters:
            return writes
        # who updates a parameter is the only replica that has its state, whichever of them writes the parameter
        assert self.mesh.replica_group is not None
        flags = [self.engine.held[name].writes for name in self.engine.parameters]
        written = anywhere(flags, self.mesh.replica_group, self.mesh.device)
        by_name = dict(zip(self.engine.parameters, written, strict=True))
        return {name for name in updated if by_name[name]}

    def _is_whole_everywhere(self) -> bool:
        """Whether all workers hold all gradients, so that each can tell their norm by itself."""
        if self.mesh.world is None:
            return True
        held = [self.engine.held[name].holders for name in self.engine.parameters]
        parts = any(holders != self.strategy.workers for holders in held)
        return not anywhere([parts], self.mesh.world, self.mesh.device)[0]

    def _scales(self, share: Share) -> list[Tensor]:
        """What the loss of each microbatch is multiplied with, 0-d: its weight over that of all replicas together."""
        if self.workload.weight is None:
            return [self._constant(microbatch.samples / share.samples) for microbatch in share.microbatches]
        weights = torch.stack(self._weights(share))
        total = weights.sum()
        if self.mesh.replica_group is not None:
            dist.all_reduce(total, group=self.mesh.replica_group)
        return list((weights / total).where(~(total <= 0), 0).unbind())  # of a weight of nan it is nan

    def _weights(self, share: Share) -> list[Tensor]:
        """What each microbatch counts, 0-d float64: its samples, or the workload's own weight of them."""
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
        """A number on our device; those of a training run are few, and copying one there costs time."""
        if value not in self._constants:
            self._constants[value] = torch.tensor(value, dtype=torch.float64, device=self.mesh.device)
        return self._constants[value]

    def _squared_norm(self, gradients: dict[str, Tensor]) -> Tensor:
        """Our part of the squared norm, or all of it where every worker has whole gradients."""
        if not gradients:
            return self._constant(0.0)
        square = squared_norm(gradients, self.engine.held, self.mesh.device)
        return square * self.strategy.workers if self._whole_everywhere else square

    def _report(self, loss: Tensor, square: Tensor) -> Tensor:
        """What all workers add up in one message: loss, squared norm, how many workers left parameters unused."""
        unused = self._constant(float(bool(self.engine.unused)))
        return torch.stack([loss.double(), square.double(), unused])

    def _forget_unused(self, report: Tensor) -> None:
        """Takes the gradient of zero from parameters that no replica used: an optimizer passes over those.

        Called on workers that left some unused. Only where all did, which all of them see here, can it be the same.
        """
        group = self.mesh.replica_group
        if group is None or not self._by_all(report[-1]):
            return
        unused = set(self.engine.unused)
        used = anywhere([name not in unused for name in self.engine.parameters], group, self.mesh.device)
        for parameter, by_any in zip(self.engine.parameters.values(), used, strict=True):
            if not by_any:
                parameter.grad = None

    def _by_all(self, count: Tensor) -> bool:
        """Whether so many workers are all of them."""
        return int(count) == self.strategy.workers

    def _update(self) -> None:
        if self._shards is not None:
            self._shards.step()
        if self._dealt is not None:
            self._dealt.exchange()
        if self.scheduler is not None:
            self.scheduler.step()
