"""Training step of one's own: a function of (model, batch) that calls the model as often as it likes.

The step computes losses and nothing else: gradients, their sums over microbatches and replicas, and the update belong
to the training. A step that does some of it itself would be applied once for each of them, so it is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.overrides import TorchFunctionMode

from shardwise.errors import WorkloadError
from shardwise.workload.losses import called, named_losses
from shardwise.workload.workload import Workload

_LEFT_TO_TRAINING = (
    (Tensor, "backward"),
    (torch.autograd, "backward"),
    (nn.Module, "zero_grad"),
    (torch.optim.Optimizer, "zero_grad"),
)
"""Functions that a step must not call, each by its owner and its name there."""


def run_step(workload: Workload, model: nn.Module, batch: Any) -> dict[str, Tensor]:
    """Run the step of a workload, and return its losses by name, each 0-d; a single loss has the name `loss`.

    Raises:
        WorkloadError: a loss is no scalar tensor, or the step does what is left to the training.
    """
    versions = [(name, parameter, parameter._version) for name, parameter in model.named_parameters()]
    with _nothing_else(workload):
        value = called(workload.step, model, model, batch)
    changed = next((name for name, parameter, version in versions if parameter._version != version), None)
    if changed is not None:  # fsdp would throw the change away, and microbatches would repeat it
        raise WorkloadError(
            f"step of workload {workload.name!r} changes parameter {changed!r}: it must only return its losses; keep "
            "what is no parameter (a moving average of weights, say) in buffers"
        )
    return named_losses(workload, "result of step", value)


def check_trained(workload: Workload, trained: bool) -> None:
    """Raise WorkloadError unless the losses of a step have a gradient of trained parameters."""
    if not trained:
        raise WorkloadError(
            f"step of workload {workload.name!r} returns losses without a gradient (computed under no_grad or from "
            "detached values): nothing would be trained"
        )


@contextmanager
def _nothing_else(workload: Workload) -> Iterator[None]:
    """Refuse to compute gradients of parameters, clear them or update parameters inside the block."""
    before = [(owner, name, getattr(owner, name)) for owner, name in _LEFT_TO_TRAINING]

    def refusing(name: str) -> Callable[..., NoReturn]:
        def refuse(*args: Any, **kwargs: Any) -> NoReturn:
            raise WorkloadError(
                f"step of workload {workload.name!r} calls {name}(): it must only return its losses, the training "
                "computes their gradients and updates the parameters"
            )

        return refuse

    hook = register_optimizer_step_pre_hook(refusing("step"))
    for owner, name, _ in before:
        setattr(owner, name, refusing(name))
    try:
        yield
    finally:
        hook.remove()
        for owner, name, function in before:
            setattr(owner, name, function)


class DerivativesNoticed(TorchFunctionMode):
    """Mode that notices whether derivatives are taken (`torch.autograd.grad`).

    Attributes:
        found: whether one has been taken.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.found |= func is torch.autograd.grad
        return func(*args, **(kwargs or {}))
