"""Run a training step of one's own on a plain module, on one or several replicas.

A step may call the model several times, or parts of it directly. What averages gradients or gathers parameters waits
for one call of one module, so that module is a root around the model, whose forward runs the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.parallel.state.pytree import map_tensors
from shardwise.workload.own_step import DerivativesNoticed, run_step
from shardwise.workload.workload import Workload


class StepRoot(nn.Module):
    """Module around a model that calls a function of (model, data).

    Attributes:
        running: whether the function is being called.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.running = False

    def forward(self, function: Callable[[nn.Module, Any], Any], data: Any) -> Any:
        """Call `function` with the model and `data`, and return its result."""
        self.running = True
        try:
            return function(self.model, data)
        finally:
            self.running = False

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, part of a backward pass, refused while a step is running: it would free parameters."""

        def called(*args: Any) -> Any:
            if self.running:
                raise WorkloadError(
                    "the step takes derivatives in some passes only, and fsdp gathers each block of the model for one "
                    "backward pass: take them in each pass (times 0 if they are not to count), or use dp"
                )
            return function(*args)

        return called


def looked_at(workload: Workload, model: nn.Module, data: Any) -> bool:
    """Run a step to see which modules it calls, and return whether it takes derivatives.

    A block of a model that a step takes derivatives of cannot be gathered or recomputed for one backward pass.
    """
    noticed = DerivativesNoticed()
    with torch.enable_grad(), noticed:
        run_step(workload, model, data)
    return noticed.found


def autocast_calls(model: nn.Module, device: torch.device) -> None:
    """Make each call of a model, or of a part of it, compute in bfloat16 and return float32.

    What a step computes between such calls stays in float32. Changes the modules in place.
    """
    inside = False

    def entered(original: Callable[..., Any]) -> Callable[..., Any]:
        def forward(*args: Any, **kwargs: Any) -> Any:
            nonlocal inside
            if inside:
                return original(*args, **kwargs)
            inside = True
            try:
                with torch.autocast(device.type, torch.bfloat16):
                    output = original(*args, **kwargs)
            finally:
                inside = False
            return map_tensors(_widened, output)

        return forward

    for module in model.modules():
        module.forward = entered(module.forward)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype == torch.bfloat16 else tensor
