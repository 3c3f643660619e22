"""Small training step that is bound by the host, to measure the overhead of eager PyTorch beside its kernels."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import nn

FEATURES = 8
ROWS = 4
BLOCKS = 12

WARM = 10
"""Steps that are not timed: in the first ones, libraries load kernels, and allocators ask the system for memory."""


def small_step(device: torch.device) -> Callable[[], None]:
    """Build a forward and backward pass through modules of few features, with residuals and views as in real models."""
    model = nn.Sequential(*[_Block() for _ in range(BLOCKS)]).to(device)
    data = torch.randn(ROWS, FEATURES, device=device)

    def step() -> None:
        model(data).sum().backward()

    return step


class _Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(FEATURES)
        self.wide = nn.Linear(FEATURES, 2 * FEATURES)
        self.activation = nn.GELU()
        self.narrow = nn.Linear(2 * FEATURES, FEATURES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = self.narrow(self.activation(self.wide(self.norm(x))))
        return x + y.view(ROWS, 2, -1).transpose(0, 1).reshape(2, ROWS, -1).transpose(0, 1).reshape(x.shape)


def timed_steps(step: Callable[[], None], seconds: float, device: torch.device) -> list[float]:
    """Return the seconds of each of several steps, after WARM warm-up steps.

    On a CPU these are seconds of the calling thread, else of the wall clock.
    """
    clock = time.thread_time if device.type == "cpu" else time.perf_counter
    for _ in range(WARM):
        step()
    found: list[float] = []
    begin = time.perf_counter()
    while len(found) < 5 or time.perf_counter() - begin < seconds:
        start = clock()
        step()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        found.append(clock() - start)
    return found
