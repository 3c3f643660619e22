"""Agreement of all workers on the step after which they stop, because a signal reaches each at a different moment."""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from shardwise.launch import stop

EVERY_SECONDS = 1.0
"""Seconds between two questions to all workers; a question is one small all-reduce, about a thousandth of that time."""

GROWTH = 4
"""Largest factor by which the number of steps between two questions may grow from one question to the next."""


class Agreement:
    """Periodic question to all workers whether one of them was told to stop; all workers ask after the same steps.

    Rank 0 chooses the number of steps between two questions, so that they come about every `EVERY_SECONDS`.
    """

    def __init__(self) -> None:
        self._together = dist.is_initialized() and dist.get_world_size() > 1
        self._first = not self._together or dist.get_rank() == 0
        self._interval = 1
        self._left = 1
        self._asked = time.monotonic()

    def stop(self) -> int:
        """Return the number of the signal on which all workers stop after this step. Collective.

        Returns 0 if they go on.
        """
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
        """Return the number of steps between this question and the next."""
        now = time.monotonic()
        step_seconds = (now - self._asked) / self._interval
        self._asked = now
        wanted = int(EVERY_SECONDS / max(step_seconds, 1e-6))
        return max(1, min(wanted, GROWTH * self._interval))
