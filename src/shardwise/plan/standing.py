"""What a search still has to look at, least first, and what the next one has to beat."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator
from typing import Generic, TypeVar

T = TypeVar("T")


class Queue(Generic[T]):
    """What is left to look at, each with the least that it can cost; of equal ones the first that came."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._came = 0

    def add(self, bound: float, what: T) -> None:
        """Takes one more."""
        heapq.heappush(self._heap, (bound, self._came, what))
        self._came += 1

    def take(self) -> tuple[float, T]:
        """(bound, what) of the one with the least bound, which is not here any more."""
        bound, _, what = heapq.heappop(self._heap)
        return bound, what

    @property
    def least(self) -> float:
        """The least bound; infinite where nothing is left."""
        return self._heap[0][0] if self._heap else math.inf

    def __iter__(self) -> Iterator[tuple[float, T]]:
        return ((bound, what) for bound, _, what in self._heap)


class Standing:
    """The values that were found so far, of which small ones are good.

    Args:
        count: of finalists.
        near: by how much a finalist may be worse than the best, in parts of it.
    """

    def __init__(self, count: int, near: float) -> None:
        self._count, self._near = count, near
        self._largest: list[float] = []
        self._best: dict[object, float] = {}

    def add(self, value: float, kind: object) -> None:
        """Takes one more value, of a kind."""
        heapq.heappush(self._largest, -value)
        if len(self._largest) > self._count:
            heapq.heappop(self._largest)
        self._best[kind] = min(value, self._best.get(kind, math.inf))

    @property
    def limit(self) -> float:
        """Above it a value is none of a finalist."""
        worst = -self._largest[0] if len(self._largest) == self._count else math.inf
        return min(worst, (1 + self._near) * min(self._best.values(), default=math.inf))

    def limit_of(self, kind: object) -> float:
        """Above it a value is neither a finalist's nor the best of its kind."""
        return max(self.limit, self._best.get(kind, math.inf))
