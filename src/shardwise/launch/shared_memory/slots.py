"""Slots through which collectives run: each worker writes its own in turn, and all others read every one of them.

A slot is written again only when all others have read it. So a worker may be some slots ahead of the others, and waits
only for one that is later than that.
"""

from __future__ import annotations

import torch
from torch import Tensor

from shardwise.launch.shared_memory.neighbours import Neighbours
from shardwise.launch.shared_memory.segment import SLOTS, SemaphoreKind


class Slots:
    """Slots of all workers of a group, as this one sees them."""

    def __init__(self, neighbours: Neighbours) -> None:
        self.rank, self.count = neighbours.rank, neighbours.count
        self._neighbours = neighbours
        own, others = neighbours.segments[self.rank], neighbours.others
        self._free = [(other, own.semaphore(SemaphoreKind.FREE, other)) for other in others]
        self._filled = [own.semaphore(SemaphoreKind.FILLED, other) for other in others]
        segments = neighbours.segments
        self._arriving = [segment.semaphore(SemaphoreKind.FILLED, self.rank) for segment in segments]
        self._read = [segment.semaphore(SemaphoreKind.FREE, self.rank) for segment in segments]
        self._turn = [0] * self.count
        self._claimed = 0
        self._views: dict[torch.dtype, list[list[Tensor]]] = {}

    def claim(self, dtype: torch.dtype) -> Tensor:
        """Return this worker's next slot as elements of `dtype`, once all others have read what it held."""
        while self._claimed < len(self._free):
            other, free = self._free[self._claimed]
            self._neighbours.wait(free, other)
            self._claimed += 1
        return self._view(self.rank, dtype)

    def free(self) -> bool:
        """Return whether `claim` would not wait."""
        while self._claimed < len(self._free):
            if not self._free[self._claimed][1].try_wait():
                return False
            self._claimed += 1
        return True

    def publish(self) -> None:
        """Let the others read the slot that was claimed."""
        self._claimed = 0
        self._turn[self.rank] += 1
        for filled in self._filled:
            filled.post()

    def take(self, other: int, dtype: torch.dtype) -> Tensor:
        """Return the next slot of another worker as elements of `dtype`, once it is published."""
        self._neighbours.wait(self._arriving[other], other)
        return self._view(other, dtype)

    def release(self, other: int) -> None:
        """Note that the slot of another worker has been read."""
        self._turn[other] += 1
        self._read[other].post()

    def _view(self, worker: int, dtype: torch.dtype) -> Tensor:
        views = self._views.get(dtype)
        if views is None:
            segments = self._neighbours.segments
            views = self._views[dtype] = [list(segment.slots.view(dtype)) for segment in segments]
        return views[worker][self._turn[worker] % SLOTS]
