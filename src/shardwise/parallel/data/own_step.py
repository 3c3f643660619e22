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
from shardwise.workload.own_step import DerivativesNoticed


class StepRoot(nn.Module):
    """Module around a model that calls a function of (model, data)."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, function: Callable[[nn.Module, Any], Any], data: Any) -> Any:
        """Call `function` with the model and `data`, and return its result."""
        return function(self.model, data)


class ForwardWatch:
    """Watch that tells whether the forward pass of a module is running.

    Attributes:
        running: whether it is.
    """

    def __init__(self, module: nn.Module) -> None:
        self.running = False
        module.register_forward_pre_hook(self._enter)
        module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, *_: Any) -> None:
        self.running = True

    def _leave(self, *_: Any) -> None:
        self.running = False

    def after(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """Return `function`, part of a backward pass, refused while the forward runs: it would free parameters."""

        def called(*args: Any) -> Any:
            if self.running:
                raise WorkloadError(
                    "the step or the model takes derivatives in some passes only, and fsdp gathers each block of the "
                    "model for one backward pass: take them in each pass (times 0 if they are not to count), or use dp"
                )
            return function(*args)

        return called


def takes_derivatives(run: Callable[[], object]) -> bool:
    """Run a forward pass or a step, and return whether it takes derivatives.

    A block of a model that derivatives are taken of cannot be gathered or recomputed for one backward pass.
    """
    noticed = DerivativesNoticed()
    with torch.enable_grad(), noticed:
        run()
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
