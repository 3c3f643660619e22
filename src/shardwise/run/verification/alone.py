"""Steps of one worker that runs the plain module, with which a parallel program is compared in its own process."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.data import default_collate

from shardwise.errors import ShardwiseError, WorkloadError, blamed
from shardwise.parallel.data.collected import Collected
from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.optim.after_step import changed
from shardwise.parallel.optim.clipping import local_gradients
from shardwise.parallel.optim.making import make_optimizer
from shardwise.parallel.program import Program
from shardwise.parallel.state.pass_state import passes_undone
from shardwise.strategy import Strategy
from shardwise.workload.data import Microbatch, Share, first_samples
from shardwise.workload.workload import Workload


class OneWorker:
    """Plain module of a program's workload on this worker alone, with given weights, at the program's step.

    Args:
        program: program to compare with.
        weights: full weights and buffers by name, as `Program.full_state_dict` returns them.
    """

    def __init__(self, program: Program, weights: Mapping[str, Tensor]) -> None:
        self.workload = program.workload
        strategy = Strategy(precision=program.strategy.precision)
        self._mesh = Mesh(strategy, program.mesh.device, 0, None)
        self._engine = ModuleEngine(self.workload, strategy, self._mesh)
        self._engine.position.step = program.steps
        with torch.no_grad():
            for name, held in self._engine.held.items():
                held.tensor.copy_(weights[name])

    def loss_and_gradients(self, shares: Sequence[Share]) -> tuple[float, dict[str, Tensor]]:
        """Return the mean loss of shares of one microbatch each, and the gradient of each parameter, on the CPU.

        Raises:
            WorkloadError: the loss depends on tensors that are trained, but are no parameters of the model.
        """
        weights = [self._weight(share.microbatches[0]) if shares[1:] else 1.0 for share in shares]
        total, sums = 0.0, dict[str, Tensor]()
        for share, weight in zip(shares, weights, strict=True):
            for parameter in self._engine.parameters.values():
                parameter.grad = None
            with self._undone():
                losses = [float(self._backward(share.microbatches[0])) for _ in self._turns()]
            part = weight / sum(weights) if sum(weights) > 0 else 0.0
            total += part * sum(losses) if part else 0.0
            for name, gradient in local_gradients(self._engine.parameters).items():
                scaled = gradient.cpu() if part == 1.0 else gradient.cpu() * part
                sums[name] = sums[name] + scaled if name in sums else scaled
        return total, sums

    def _turns(self) -> Iterator[None]:
        """Move the engine to each turn of a step, one by one."""
        for turn in range(max(1, len(self.workload.turns))):
            self._engine.position.turn = turn
            yield

    def _backward(self, microbatch: Microbatch) -> Tensor:
        """Compute the gradients of the current turn, and return its loss."""
        with self._engine.own_turn():
            loss = self._engine.loss_of(microbatch)
            self._check_leaves(loss, microbatch)
            self._engine.backward(loss)
        return loss.detach()

    @torch.no_grad()
    def mean_loss(self, share: Share) -> float | None:
        """Return the mean of the microbatches' losses, with batch norms as in evaluation.

        Returns None if the model normalises by a function of its own over the batch, which couples samples as a batch
        norm does.
        """
        losses = []
        with _norms_evaluating(self._engine.model), _Normalising() as normalising:
            for microbatch in share.microbatches:
                with self._undone():
                    losses.append(sum(float(self._engine.loss_of(microbatch)) for _ in self._turns()))
        weights = [self._weight(microbatch) for microbatch in share.microbatches]
        pairs = [(loss, weight) for loss, weight in zip(losses, weights, strict=True) if weight > 0]
        if normalising.found or not pairs:
            return None
        return sum(loss * weight for loss, weight in pairs) / sum(weight for _, weight in pairs)

    def draws(self) -> bool:
        """Return whether the model drew random numbers that workers do not share."""
        return self._engine.draws_other_random_numbers

    def update(self) -> None:
        """Run one step of the workload's optimizer with the gradients of the last pass, and what follows a step.

        Raises:
            WorkloadError: the optimizer cannot be built or take a step, or `after_step` fails.
        """
        with _blamed("optimizer", self.workload):
            make_optimizer(self.workload, self._engine.parameters).step()
        with self._undone():
            for name, parameter in self._engine.parameters.items() if self.workload.after_step else ():
                changed(self.workload, name, parameter.detach())

    def evaluate(self) -> None:
        """Evaluate the first two samples of each held-out set, so that a wrong metric is found before the training.

        Raises:
            WorkloadError: an evaluation fails.
        """
        for number, evaluation in enumerate(self.workload.evaluations):
            samples = first_samples(evaluation.dataset, 2)
            if not samples:
                continue
            with _blamed("evaluation", self.workload), self._undone():
                batch = (self.workload.collate or default_collate)(samples)
                found = self._engine.evaluate(Microbatch(batch, len(samples), 0), number)
                if evaluation.collects:  # no value is computed: two samples need not have one
                    Collected(evaluation, self.workload, self._mesh).update(found, len(samples))

    def _undone(self) -> AbstractContextManager[None]:
        """Undo what a pass inside the block changes: every pass starts from the state of the program."""
        return passes_undone(self.workload, self._engine.module)

    def _weight(self, microbatch: Microbatch) -> float:
        weigh = self.workload.weight
        return float(microbatch.samples if weigh is None else weigh(microbatch.data))

    def _check_leaves(self, loss: Tensor, microbatch: Microbatch) -> None:
        """Check that the gradient of `loss` reaches only parameters of the model, and what the pass itself has made.

        A model may make a leaf to take derivatives by it; another pass then makes another one.

        Raises:
            WorkloadError: it reaches a tensor from elsewhere.
        """
        known = {id(parameter) for parameter in self._engine.model.parameters()}
        strange = [leaf for leaf in _leaves(loss) if id(leaf) not in known]
        if not strange:
            return
        with self._undone():
            again = {id(leaf) for leaf in _leaves(self._engine.loss_of(microbatch))}
        outside = next((leaf for leaf in strange if id(leaf) in again), None)
        if outside is not None:
            raise WorkloadError(
                f"the loss of workload {self.workload.name!r} depends on a trained tensor of shape "
                f"{tuple(outside.shape)} that is no parameter of the model, so nothing would train it: make it a "
                "parameter of the model, or detach it"
            )


def _blamed(field: str, workload: Workload) -> AbstractContextManager[None]:
    passing = (ShardwiseError, MemoryError, torch.OutOfMemoryError)
    return blamed(f"{field} of workload {workload.name!r} fails", passing)


def _leaves(loss: Tensor) -> Iterator[Tensor]:
    """Yield the leaf tensors that the gradient of `loss` reaches."""
    waiting: list[Any] = [loss.grad_fn]
    seen = set(waiting)
    while waiting:
        node = waiting.pop()
        if hasattr(node, "variable"):
            yield node.variable
        following = {following for following, _ in getattr(node, "next_functions", ()) if following is not None} - seen
        seen |= following
        waiting.extend(following)


@contextmanager
def _norms_evaluating(model: nn.Module) -> Iterator[None]:
    """Put batch norms into evaluation mode: they couple the samples of a batch, which is no fault of the loss."""
    norms = [module for module in model.modules() if isinstance(module, _BatchNorm) and module.training]
    for norm in norms:
        norm.training = False
    try:
        yield
    finally:
        for norm in norms:
            norm.training = True


class _Normalising(TorchFunctionMode):
    """Mode that notices functions that normalise over a batch with its own statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.batch_norm:
            self.found |= bool(kwargs.get("training", args[5] if len(args) > 5 else False))
        return func(*args, **kwargs)
