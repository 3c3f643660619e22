"""Run a training step of one's own on a plain module, on one or several replicas.

A step may call the model several times, or parts of it directly. What averages gradients or gathers parameters waits
for one call of one module, so that module is a root around the model, whose forward runs the whole step.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from shardwise.errors import WorkloadError
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
