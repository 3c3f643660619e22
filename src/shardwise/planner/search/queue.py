"""Open items of a search, lowest bound first, and the value that the next one has to beat."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterator, Set
from typing import Generic, TypeVar, cast

T = TypeVar("T")
W = TypeVar("W")


class Queue(Generic[T]):
    """Open items, ordered by lower bound; items with equal bounds come first in, first out."""

    def __init__(self) -> None:
        self._heap: list[tuple[float, int, T]] = []
        self._came = 0

    def add(self, bound: float, what: T) -> None:
        """Add an item."""
        heapq.heappush(self._heap, (bound, self._came, what))
        self._came += 1

    def take(self) -> tuple[float, T]:
        """Remove and return (bound, item) with the lowest bound."""
        bound, _, what = heapq.heappop(self._heap)
        return bound, what

    def take_first(self, wanted: Set[W]) -> tuple[float, W]:
        """Remove and return (bound, item) of the wanted item with the lowest bound; at least one must be open."""
        found = min(entry for entry in self._heap if entry[2] in wanted)
        self._heap.remove(found)
        heapq.heapify(self._heap)
        return found[0], cast("W", found[2])

    @property
    def least(self) -> float:
        """Lowest bound in the queue; infinite if the queue is empty."""
        return self._heap[0][0] if self._heap else math.inf

    def __iter__(self) -> Iterator[tuple[float, T]]:
        return ((bound, what) for bound, _, what in self._heap)


class BestSoFar:
    """Best objective values so far; smaller is better.

    Args:
        count: number of finalists.
        near: fraction by which a finalist may be worse than the best.
    """

    def __init__(self, count: int, near: float) -> None:
        self._count, self._near = count, near
        self._largest: list[float] = []
        self._best: dict[object, float] = {}

    def add(self, value: float, kind: object) -> None:
        """Add the value of a candidate of this kind."""
        heapq.heappush(self._largest, -value)
        if len(self._largest) > self._count:
            heapq.heappop(self._largest)
        self._best[kind] = min(value, self._best.get(kind, math.inf))

    @property
    def limit(self) -> float:
        """Largest value that a finalist can have."""
        worst = -self._largest[0] if len(self._largest) == self._count else math.inf
        return min(worst, (1 + self._near) * min(self._best.values(), default=math.inf))

    def limit_of(self, kind: object) -> float:
        """Return the largest value that a finalist, or the best of its kind, can have."""
        return max(self.limit, self._best.get(kind, math.inf))
