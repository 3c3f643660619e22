"""The optimizer and the learning-rate schedule that the recipes share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR


def adamw(
    learning_rate: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.999)
) -> Callable[[Iterable[nn.Parameter]], Optimizer]:
    """Return a factory of AdamW optimizers that decay matrices and kernels, but neither norms nor biases."""

    def build(parameters: Iterable[nn.Parameter]) -> Optimizer:
        parameters = list(parameters)
        # both groups always exist, so that state saved with one set of parameters fits any other
        groups = [
            {"params": [p for p in parameters if p.dim() > 1], "weight_decay": weight_decay},
            {"params": [p for p in parameters if p.dim() <= 1], "weight_decay": 0.0},
        ]
        return AdamW(groups, lr=learning_rate, betas=betas)

    return build


def warmup_cosine(steps: int, warmup: float = 0.1, floor: float = 0.02) -> Callable[[Optimizer], LambdaLR]:
    """Return a factory of learning-rate schedules: linear warm-up, then a cosine to a floor at which the rate stays.

    Args:
        steps: optimizer steps of the schedule, 1 or more.
        warmup: share of the steps in which the rate rises linearly.
        floor: final learning rate as a share of the largest one.
    """
    rising = max(1, round(steps * warmup))

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        progress = min(1.0, (step - rising) / max(1, steps - rising))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * progress))

    return lambda optimizer: LambdaLR(optimizer, factor)


def epochs_of(steps: int, dataset: Sized, batch_size: int) -> float:
    """Return the number of epochs, with a fraction, that `steps` optimizer steps are."""
    return steps / max(1, -(-len(dataset) // batch_size))


def warmup_constant(steps: int) -> Callable[[Optimizer], LambdaLR]:
    """Return a factory of learning-rate schedules that rise linearly over `steps` steps and then stay."""
    return lambda optimizer: LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / steps))
