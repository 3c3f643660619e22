"""Compute the norm of a gradient that lies on many workers, and scale the gradient down to a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shardwise.parallel.state.dtensor_rows import local
from shardwise.parallel.state.layout import TensorPlacement


def local_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the local parts of the gradients by name; they share the gradients' memory."""
    return {name: local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}


def local_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the local parts of the parameters by name; they share the parameters' memory."""
    return {name: local(parameter) for name, parameter in parameters.items()}


def squared_norm(gradients: Mapping[str, Tensor], held: Mapping[str, TensorPlacement], device: torch.device) -> Tensor:
    """Compute this worker's part of the squared global norm, 0-d. The parts of all workers add up to it.

    Each element counts once: its square is divided by the number of workers that hold it.
    """
    groups: dict[tuple[int, torch.device], list[Tensor]] = {}
    for name, gradient in gradients.items():
        groups.setdefault((held[name].holders, gradient.device), []).append(gradient)
    total = torch.zeros((), device=device)
    for (holders, _), several in groups.items():
        total = total + (torch.stack(torch._foreach_norm(several)).square().sum() / holders).to(device)
    return total


def clip_factor(norm: Tensor, limit: float) -> Tensor:
    """Return the factor, at most 1, that scales gradients of global norm `norm` down to `limit`."""
    return (limit / (norm + 1e-6)).clamp(max=1.0)


def clip(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scale gradients of global norm `norm` down to `limit`, as `torch.nn.utils.clip_grad_norm_` does.

    Changes them in place.
    """
    scale = clip_factor(norm, limit)
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        several = [gradient for gradient in gradients if gradient.device == device]
        torch._foreach_mul_(several, scale.to(device, several[0].dtype))
