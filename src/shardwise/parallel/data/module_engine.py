"""Run a plain module unchanged on a share of the batch, for `single`, `dp`, `fsdp` and `dp` times `fsdp`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.data import default_collate

from shardwise.errors import WorkloadError
from shardwise.options import BF16
from shardwise.parallel.data.blocks import repeated_blocks, steady_modules
from shardwise.parallel.data.ddp import ReplicatedModel
from shardwise.parallel.data.joining import Joining, joining_of
from shardwise.parallel.data.own_step import StepRoot, takes_derivatives
from shardwise.parallel.data.turns import by_turn, trained_alone
from shardwise.parallel.data.whole_batch import of_all_replicas
from shardwise.parallel.engine import Evaluated, Position
from shardwise.parallel.faults import Fault, RerunPass, gradient_fault, module_fault, passes_of
from shardwise.parallel.mesh import Mesh, random_state_kept
from shardwise.parallel.operators.module_patches import DRAWN, ModulePatches
from shardwise.parallel.operators.true_gradients import true_gradients
from shardwise.parallel.optim.clipping import local_gradients
from shardwise.parallel.state.buffers import Buffers
from shardwise.parallel.state.build_model import (
    aliases_of,
    build_model,
    evaluating,
    frozen_later,
    trained_of,
    untouched,
)
from shardwise.parallel.state.dtensor_rows import is_split, row_layout
from shardwise.parallel.state.layout import Layout, TensorPlacement
from shardwise.parallel.state.materialize import materialize, read_weights
from shardwise.parallel.state.parameter_hooks import ParameterHooks, check_hooks, take_hooks
from shardwise.splitting.ownership import assign_owners
from shardwise.strategy import Strategy
from shardwise.workload.data import Microbatch, Share, first_samples
from shardwise.workload.losses import losses_of, total
from shardwise.workload.own_step import check_trained, run_step
from shardwise.workload.precision import Copies, calls_computing, computed, kept_of
from shardwise.workload.pytree import map_tensors, to_device, unlike
from shardwise.workload.trace.stand_ins import stand_ins
from shardwise.workload.turns import names_of_turns
from shardwise.workload.weight_files import weights_of
from shardwise.workload.workload import Workload, call_model

if TYPE_CHECKING:
    from shardwise.parallel.data.fsdp import ShardedModel

_ALONE = 4
"""Number of samples that are passed through the model one by one to find its blocks."""


class ModuleEngine:
    """Engine that runs the module of a workload, whole or sharded. See `engine.Engine` for the attributes.

    Raises:
        WorkloadError: the model has nothing to train, or differs between workers.
        StrategyError: the model cannot be sharded.
    """

    uniform, averages = False, True

    def __init__(self, workload: Workload, strategy: Strategy, mesh: Mesh) -> None:
        self._workload, self._strategy, self._mesh = workload, strategy, mesh
        self.position = Position(seed=workload.seed)
        self._gradients: dict[int, tuple[Tensor, Tensor]] = {}
        self.losses: dict[str, Tensor] = {}
        self._copies = Copies()
        self.model = model = build_model(workload, mesh)
        self.aliases, self.trained = aliases_of(model), trained_of(model)
        self._kept = kept_of(self._precision, model, workload.float32)
        hooks = take_hooks(model)
        check_hooks(hooks, replaced=strategy.splits_parameters, served=bool(strategy.ps))
        self._turns = names_of_turns(workload.name, workload.turns, list(self.trained))
        self._members = [frozenset(names) for names in self._turns]
        self._workloads = by_turn(workload)
        group = None if strategy.stale else mesh.replica_group  # workers of different steps cannot compute together
        self._buffers = Buffers(model, group)
        self._operations = ModulePatches(
            self.position,
            mesh.device,
            mesh.new_replica_group if group is not None else None,
            recompute=strategy.recomputes,
            gradient_factor=strategy.replicas,
        )
        self._operations.install(model)
        self._notes: list[str] = []
        self._root = None if workload.step is None else StepRoot(model)
        self.joining = joining_of(mesh, self.position)
        if self.joining is not None:
            self.joining.keep_exact(self._kept.names)
        self._by_turn = self._split(model)
        if self._root is not None:
            self._calls = calls_computing(self._precision, model, self._seen_parameters, self._copies, self._kept)
            self._calls.__enter__()  # for as long as the engine lives
        held = dict(model.named_parameters())
        self.parameters = {name: held[name] for name in self.trained}
        self.held = self._lay_out({**held, **self._buffers.persistent})
        self._hooks = ParameterHooks(hooks, self.held, mesh)

    def unsplit_layout(self, name: str) -> Layout:
        """Return the layout of a whole parameter, see `Engine.unsplit_layout`."""
        return Layout.whole(self.parameters[name].shape)

    def partial_groups(self, name: str) -> Sequence[dist.ProcessGroup]:
        """Return none: each replica computes all of a gradient."""
        return ()

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, one line each."""
        unreproducible = self.draws_other_random_numbers and self._mesh.world is not None
        return (*self._notes, *self._buffers.notes, *((DRAWN,) if unreproducible else ()))

    @property
    def module(self) -> nn.Module:
        """Return the model, see `Engine.module`."""
        return self.model

    @property
    def draws_other_random_numbers(self) -> bool:
        """Return whether the model drew random numbers that workers do not share, as in `Engine`."""
        return self._operations.draws_other_random_numbers

    @property
    def replicas(self) -> Alone | ReplicatedModel | ShardedModel:
        """Return what sums the gradients of the current turn over the replicas."""
        return self._by_turn[self.position.turn]

    def own_turn(self) -> AbstractContextManager[None]:
        """Return a context for passes of the current turn, in which the other turns' parameters are constants."""
        return trained_alone(self.parameters, self._members[self.position.turn])

    @property
    def model_of_replicas(self) -> nn.Module:
        """Return what is called in training: the model, or torch's wrapper around it."""
        return self.replicas.call

    @property
    def recomputing(self) -> bool:
        """Return whether a block is being recomputed, see `Engine.recomputing`."""
        return self._operations.recomputing

    @property
    def unused(self) -> Sequence[str]:
        """Return the names of parameters without a gradient on this worker, see `Engine.unused`."""
        return self.replicas.unused

    def forward_backward(self, share: Share, scales: Sequence[Tensor]) -> Tensor:
        """Compute the gradients of a share, see `Engine.forward_backward`."""
        self._check_frozen()
        with self.own_turn(), self._copies.anew():
            parts = self._passes(share, scales)
        self._buffers.settle()
        self._hooks.apply(self._members[self.position.turn])
        whole = parts.pop("")
        self.losses = parts if len(parts) > 1 or self._workload.turns else {}
        return whole

    def _passes(self, share: Share, scales: Sequence[Tensor]) -> dict[str, Tensor]:
        """Compute the gradients of a share, and return its losses by name; their sum has an empty name."""
        sums: dict[str, Tensor] | None = None
        last = len(share.microbatches) - 1
        for number, (microbatch, scale) in enumerate(zip(share.microbatches, scales, strict=True)):
            data = self._enter(microbatch)
            with self.replicas.microbatch(number == 0, number == last):
                if self._root is None:
                    losses = self._trained_losses(self._guarded(self._output(data), scale), data)
                else:
                    losses = self._stepped(self.replicas.call, data, scale)
                loss = total(losses)
                if number == last:
                    self.replicas.before_backward(loss)
                with self._copies.adding(number < last or isinstance(self.replicas, Alone)):
                    loss.backward(self._gradient_of(loss, scale))  # type: ignore[no-untyped-call]
            parts = {name: self._part(each, scale) for name, each in {**losses, "": loss}.items()}
            sums = parts if sums is None else {name: sums[name] + part for name, part in parts.items()}
        assert sums is not None
        return sums

    def _part(self, loss: Tensor, scale: Tensor) -> Tensor:
        """Return what a loss adds to the loss of the step on this worker."""
        part = loss.detach() * scale
        return part if self._workload.weight is None else part.where(scale != 0, 0)

    def evaluate(self, microbatch: Microbatch, number: int) -> Evaluated:
        """Compute loss and metric of a microbatch, see `Engine.evaluate`."""
        self._copies.forget()
        data = self._enter(microbatch)
        evaluation = self._workload.evaluations[number]
        measure: Any = evaluation.measure
        with evaluating(self.model), torch.no_grad():
            output = self._forward(self.model, data) if self._root is None else self._root(self._forward, data)
            loss = total(self._losses(output, data))
            metric = torch.zeros_like(loss) if evaluation.collects else measure(output, data)
        self._copies.forget()
        self.replicas.reshard()
        values = torch.stack([loss.double(), torch.as_tensor(metric, device=loss.device).double()])
        return Evaluated(values, True, output, data) if evaluation.collects else Evaluated(values)

    def find_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find the first output that is not finite, see `Engine.find_fault`."""
        with self.own_turn():
            fault = module_fault(self.model, self.loss_of, passes_of(share, scales), self._mesh.rank)
        self.replicas.reshard()
        return fault

    def find_gradient_fault(self, share: Share, scales: Sequence[Tensor]) -> Fault | None:
        """Find a gradient that is not finite, see `Engine.find_gradient_fault`.

        Names the replica too, unless the replicas' gradients have been summed into sharded ones.
        """
        if self._strategy.splits_parameters and self._mesh.replica_group is not None:
            return gradient_fault(local_gradients(self.parameters), -1)
        with self.own_turn():
            found = [self._own_gradient_fault(each) for each in passes_of(share, scales)]
        return next(filter(None, found), None)

    def _own_gradient_fault(self, each: RerunPass) -> Fault | None:
        """Recompute the gradients of one microbatch and find one that is not finite, before the replicas sum them."""
        loss = self.loss_of(each.microbatch)
        # unlike `backward` this leaves `.grad` unchanged and communicates nothing
        names, start = self._turns[self.position.turn], self._gradient_of(loss, each.scale)
        parameters = [self.parameters[name] for name in names]
        gradients = torch.autograd.grad(loss, parameters, start, allow_unused=True)
        given = {name: g for name, g in zip(names, gradients, strict=True) if g is not None}
        return gradient_fault(given, self._mesh.rank) if each.counts else None

    def backward(self, loss: Tensor) -> None:
        """Compute the gradients of a result of `loss_of`, with the hooks of parameters."""
        loss.backward()  # type: ignore[no-untyped-call]
        self._hooks.apply(self._members[self.position.turn])

    def _check_frozen(self) -> None:
        """Raise WorkloadError if a parameter was frozen or unfrozen: the optimizer and the replicas would not know."""
        for name, held in self.held.items():
            if isinstance(held.tensor, nn.Parameter) and held.tensor.requires_grad != (name in self.parameters):
                raise WorkloadError(frozen_later(name))

    def loss_of(self, microbatch: Microbatch) -> Tensor:
        """Compute the loss of a microbatch in a training forward pass of the plain module, without DDP."""
        self._copies.forget()
        data = self._enter(microbatch)
        if self._root is not None:
            return total(self._stepped(self._root, data))
        with self._operations.training_pass():
            output = self._forward(self.model, data)
        return total(self._trained_losses(output, data))

    @torch.enable_grad()
    def _stepped(self, call: Any, data: Any, scale: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the losses of a step of one's own, which may take derivatives.

        Args:
            call: our root around the model, or torch's wrapper around that.
            data: data of the microbatch.
            scale: factor of its loss, see `_guarded`.

        Raises:
            WorkloadError: the losses need no gradient.
        """
        workload = self._workloads[self.position.turn]
        guard: AbstractContextManager[Any] = nullcontext()
        if scale is not None and self._workload.weight is not None:
            guard = self.model.register_forward_hook(lambda *passed: self._guarded(passed[2], scale))
        with self._operations.training_pass(), guard:
            losses: dict[str, Tensor] = call(partial(run_step, workload), data)
        check_trained(workload, total(losses).requires_grad)
        return losses

    def _gradient_of(self, loss: Tensor, scale: Tensor) -> Tensor:
        """Return the gradient of the loss that starts the backward pass: `scale` times the number of replicas.

        DDP and FSDP average gradients over the replicas, which cancels the factor. A loss of the whole batch starts
        with the number of replicas alone: each computes all of it, and has the gradient of its own outputs only.
        """
        if self._workload.whole_batch:
            return torch.full_like(loss, self._strategy.replicas)
        if self._workload.weight is not None:
            return (scale * self._strategy.replicas).to(loss.dtype)
        # a training run has few scales, always the same objects: cache the results, every small operation costs time
        if id(scale) not in self._gradients:
            self._gradients[id(scale)] = (scale, (scale * self._strategy.replicas).to(loss.dtype))
        return self._gradients[id(scale)][1]

    def _enter(self, microbatch: Microbatch) -> Any:
        """Move the position to a microbatch, and return its data on our device."""
        data = to_device(microbatch.data, self._mesh.device)
        self.position.enter(microbatch)
        return data

    def _forward(self, call: Any, data: Any) -> Any:
        inputs = self._workload.inputs(data)
        return computed(
            self._precision, self._seen_parameters(), lambda: call_model(call, inputs), self._copies, self._kept
        )

    def _output(self, data: Any) -> Any:
        """Compute the output of a training pass.

        A function of its own, so that no local variable keeps the large output alive: only some losses need it in the
        backward pass.
        """
        with self._operations.training_pass():
            return self._forward(self.replicas.call, data)

    def _trained_losses(self, output: Any, data: Any) -> dict[str, Tensor]:
        with self._operations.training_loss():
            return self._losses(output, data)

    def _losses(self, output: Any, data: Any) -> dict[str, Tensor]:
        if self._workload.whole_batch:
            samples, group = self.position.counted, self._mesh.replica_group
            output = of_all_replicas(output, samples, group, "output")
            data = of_all_replicas(data, samples, group, "batch")
        with true_gradients(self._strategy.replicas):
            return losses_of(self._workload, self.model, output, data)

    @property
    def _precision(self) -> str:
        return self._strategy.precision_of(self._workload.precision)

    def _seen_parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters that operations see: `fully_shard` shows them what it has gathered instead."""
        return (parameter for parameter in self.model.parameters() if not is_split(parameter))

    def _guarded(self, output: Any, scale: Tensor) -> Any:
        """Keep the gradient of a microbatch with scale 0 at zero, even if its loss is a mean over nothing (0 / 0)."""
        if self._workload.weight is None:
            return output

        def guard(tensor: Tensor) -> Tensor:
            guarded: Tensor = _Guard.apply(tensor, scale) if tensor.requires_grad else tensor  # type: ignore[no-untyped-call]
            return guarded

        return map_tensors(guard, output)

    def _split(self, model: nn.Module) -> Sequence[Alone | ReplicatedModel | ShardedModel]:
        """Wrap the model for each turn as the strategy requires: recomputed blocks, FSDP, DDP or none."""
        strategy, joining = self._strategy, self.joining
        sharded = strategy.splits_parameters
        blocks = self._find_blocks(model) if sharded or strategy.recomputes else []
        for block in blocks[: strategy.recomputed_of(len(blocks))]:
            self._operations.recompute(block, products=strategy.saves_products)
        if joining is not None and sharded:
            from shardwise.parallel.data.fsdp import ShardedModel  # importing it takes a second

            replicas = ShardedModel(
                model, blocks, self._mesh, joining, self._root, narrow=self._precision == BF16, whole=self._kept.names
            )
            self._read(model)
            return [replicas]
        self._read(model)
        root = self._root or model
        if joining is None:
            return [Alone(root)] * len(self._turns)
        parameters = dict(model.named_parameters())
        trained = {name: parameters[name] for name in self.trained}
        with self._mesh.allocating():
            return [self._replicated(root, trained, names, joining) for names in self._turns]

    def _replicated(
        self, root: nn.Module, trained: Mapping[str, nn.Parameter], names: Sequence[str], joining: Joining
    ) -> ReplicatedModel:
        """Wrap the model so that the gradients of the parameters `names` are averaged."""
        accumulates, bucket = self._strategy.microbatches > 1, self._strategy.bucket
        group = self._mesh.replica_group
        assert group is not None
        with trained_alone(
            trained, frozenset(names)
        ):  # DDP waits for the gradient of each parameter that needs one by now
            return ReplicatedModel(
                root,
                {name: trained[name] for name in names},
                group,
                joining.whole,
                accumulates=accumulates,
                bucket=bucket,
            )

    def _read(self, model: nn.Module) -> None:
        """Read this worker's part of the parameters on the meta device, if the workload's weights are in files."""
        weights = weights_of(self._workload.model)
        if weights is None:
            return
        empty = [name for name, parameter in model.named_parameters() if parameter.is_meta]
        materialize(model, self._mesh.device, self._mesh.home, self._mesh.allocating)
        made = dict(model.named_parameters())
        for name in empty:
            read_weights(weights, name, made[name], row_layout(made[name]))

    def _find_blocks(self, model: nn.Module) -> list[nn.Module]:
        batches = [to_device(batch, self._mesh.device) for batch in first_batches(self._workload, self._strategy)]
        if not batches:
            self._notes.append("the dataset can be read only once: no pass to look for repeated blocks in the model")
            return []
        empty = any(parameter.is_meta for parameter in model.parameters())
        passes = [partial(self._look, model, batch) for batch in (unlike(batches) if empty else batches)]
        with evaluating(model), untouched(model), random_state_kept():
            blocks = repeated_blocks(model, steady_modules(model, passes))
        self._copies.forget()
        if not blocks:
            kinds = {
                "fsdp": self._strategy.fsdp > 1,
                f"recompute={self._strategy.recompute}": self._strategy.recomputes,
            }
            wanted = " and ".join(kind for kind, used in kinds.items() if used)
            self._notes.append(f"no repeated blocks in the model: {wanted} treats it as one, which saves less memory")
        return blocks

    def _look(self, model: nn.Module, batch: Any) -> bool:
        """Run one forward pass through a model, with stand-ins for parameters that have no values yet.

        Returns whether the pass takes derivatives.
        """
        with stand_ins(model, batch) as (mode, given), mode or nullcontext():
            if self._root is not None:
                return takes_derivatives(partial(run_step, self._workload, model, given))
            return takes_derivatives(partial(self._forward, model, given))

    def _lay_out(self, tensors: Mapping[str, Tensor]) -> dict[str, TensorPlacement]:
        """Describe how each tensor lies on this worker. The replicas share the work of writing checkpoints."""
        strategy, mesh = self._strategy, self._mesh
        sizes = {name: tensor.numel() for name, tensor in tensors.items()}
        by_all, by_rows = assign_owners(sizes, strategy.replicas), assign_owners(sizes, strategy.dp)
        held = {}
        for name, tensor in tensors.items():
            layout = row_layout(tensor)
            if is_split(tensor):
                held[name] = TensorPlacement(tensor, layout, strategy.dp, by_rows[name] == mesh.coordinate("dp"))
            else:
                held[name] = TensorPlacement(tensor, layout, strategy.replicas, by_all[name] == mesh.replica)
        return held


class Alone:
    """Replication over a single worker, or by parameter servers: nothing is communicated in a pass."""

    unused: Sequence[str] = ()

    def __init__(self, model: nn.Module) -> None:
        self.call = model

    def microbatch(self, first: bool, last: bool) -> AbstractContextManager[None]:
        """Return a context for the forward and backward pass of a microbatch; it does nothing."""
        return nullcontext()

    def before_backward(self, loss: Tensor) -> None:
        """Do nothing: nobody is waited for."""

    def reshard(self) -> None:
        """Do nothing: no parameter is gathered."""


class _Guard(torch.autograd.Function):
    """Identity in the forward pass; the gradient is zero if the scale of the microbatch is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(scale)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (scale,) = ctx.saved_tensors
        return gradients[0].where(scale != 0, 0), None


def first_batches(workload: Workload, strategy: Strategy) -> list[Any]:
    """Return one replica's first microbatch in the dataset's own order, and a few first samples as batches of one.

    Single samples reveal modules that not every batch calls. Returns an empty list if reading would use up an iterable
    dataset.
    """
    count = max(1, workload.batch_size // (strategy.replicas * max(strategy.microbatches, 1)))
    samples = first_samples(workload.dataset, max(count, _ALONE))
    if samples is None:
        return []
    collate = workload.collate or default_collate
    return [collate(part) for part in (samples[:count], *([sample] for sample in samples[:_ALONE]))]
