"""A small workload that goes wrong on one rank at one step, for `benchmarks.faults` and nobody else.

The fault is in the dataset, which every strategy reads as it runs: what a loss does may be traced once and not again.
"""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import Dataset, TensorDataset

from shardwise import Workload

SAMPLES, BATCH = 512, 16
MOMENT = Path("moment")
"""File into which the rank writes when its fault happened, in seconds of the machine's monotonic clock."""


class Faulty(Dataset[tuple[torch.Tensor, ...]]):
    """Samples of which one, of the batch of step `step`, is where `rank` goes wrong."""

    def __init__(self, fault: str, rank: int, step: int, pause: float) -> None:
        generator = torch.Generator().manual_seed(1)
        self._data = TensorDataset(torch.randn(SAMPLES, 8, generator=generator), torch.arange(SAMPLES) % 4)
        self._fault, self._here, self._step, self._pause = fault, os.environ.get("RANK") == str(rank), step, pause
        self._batches = 0

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[torch.Tensor, ...]:
        """Return one sample, as the strategies that trace the model look at; nothing goes wrong here."""
        sample: tuple[torch.Tensor, ...] = self._data[index]
        return sample

    def __getitems__(self, indices: list[int]) -> list[tuple[torch.Tensor, ...]]:
        self._batches += 1
        time.sleep(self._pause)
        if self._here and self._batches >= self._step:
            self._go_wrong()
        return [self._data[index] for index in indices]

    def _go_wrong(self) -> None:
        if not MOMENT.exists():
            MOMENT.write_text(str(time.monotonic()))
        number = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}.get(self._fault)
        if number is not None:
            os.kill(os.getpid(), number)
        elif self._fault == "raise":
            raise ValueError("sample 17 is odd")
        elif self._fault == "leave":
            os._exit(0)
        elif self._fault == "hang":
            time.sleep(1e6)
        elif self._fault == "spin":
            while True:
                pass
        elif self._fault == "slow":
            time.sleep(0.2)


def workload(fault: str = "", rank: int = 1, step: int = 5, pause: float = 0.02) -> Workload:
    """The training of a small network that goes wrong with `fault`."""
    return Workload(
        name="faulty",
        model=lambda: nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)),
        dataset=Faulty(fault, rank, step, pause),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        batch_size=BATCH,
    )
