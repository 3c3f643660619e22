"""Agree among all workers to stop after the same step, for a signal reaches each of them at another moment."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from shardwise.launch import stop

EVERY_SECONDS = 1.0
"""Between two questions to all workers: one small message, about a thousandth of that time."""

GROWTH = 4
"""How many times as many steps at most lie between two questions as between those before."""


class Agreement:
    """Asks all workers now and then whether one of them was told to stop; all ask after the same steps.

    How many steps lie between two questions is what the first worker finds right for `EVERY_SECONDS`.
    """

    def __init__(self) -> None:
        self._together = dist.is_initialized() and dist.get_world_size() > 1
        self._first = not self._together or dist.get_rank() == 0
        self._interval = 1
        self._left = 1
        self._asked = time.monotonic()

    def stop(self) -> int:
        """Return after a step the number of the signal on which all workers stop now; 0: they go on. Collective."""
        if not self._together:
            return stop.requested()
        self._left -= 1
        if self._left:
            return 0
        answers = torch.tensor([stop.requested(), self._next() if self._first else 0])
        dist.all_reduce(answers, dist.ReduceOp.MAX)
        signal, self._interval = answers.tolist()
        self._left = self._interval
        return int(signal)

    def _next(self) -> int:
        """Return how many steps lie between this question and the next."""
        now = time.monotonic()
        step_seconds = (now - self._asked) / self._interval
        self._asked = now
        wanted = int(EVERY_SECONDS / max(step_seconds, 1e-6))
        return max(1, min(wanted, GROWTH * self._interval))
