"""The norm of a gradient that lies on many workers, and scaling it down to a limit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from shardwise.parallel.engine import Held
from shardwise.parallel.rows import local


def local_gradients(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parts of the gradients that are held here, sharing their memory."""
    return {name: local(parameter.grad) for name, parameter in parameters.items() if parameter.grad is not None}


def local_tensors(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """The parts of the parameters that are held here, sharing their memory."""
    return {name: local(parameter) for name, parameter in parameters.items()}


def squared_norm(gradients: Mapping[str, Tensor], held: Mapping[str, Held], device: torch.device) -> Tensor:
    """This worker's part of the squared global norm, 0-d: adding up those of all workers counts each element once."""
    alike: dict[tuple[int, torch.device], list[Tensor]] = {}
    for name, gradient in gradients.items():
        alike.setdefault((held[name].holders, gradient.device), []).append(gradient)
    total = torch.zeros((), device=device)
    for (holders, _), several in alike.items():
        total = total + (torch.stack(torch._foreach_norm(several)).square().sum() / holders).to(device)
    return total


def clip(gradients: Sequence[Tensor], norm: Tensor, limit: float) -> None:
    """Scales gradients of global norm `norm` down to `limit`, as `torch.nn.utils.clip_grad_norm_` does."""
    scale = (limit / (norm + 1e-6)).clamp(max=1.0)
    for device in dict.fromkeys(gradient.device for gradient in gradients):
        several = [gradient for gradient in gradients if gradient.device == device]
        torch._foreach_mul_(several, scale.to(device, several[0].dtype))
