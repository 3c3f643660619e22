"""Curve of a value over the steps of a run, in a bounded number of points."""

from __future__ import annotations

from shardwise.reports.sparkline import means

MOST_POINTS = 256
"""Largest number of points of a curve."""


class Curve:
    """Means of a value over equally long parts of a run. If there are too many, two neighbours become one."""

    def __init__(self) -> None:
        self._points: list[float] = []
        self._each = 1
        self._sum, self._count = 0.0, 0

    def add(self, value: float) -> None:
        """Add the value of one more step."""
        self._sum, self._count = self._sum + value, self._count + 1
        if self._count < self._each:
            return
        self._points.append(self._sum / self._count)
        self._sum, self._count = 0.0, 0
        if len(self._points) == MOST_POINTS:
            self._points = means(self._points, MOST_POINTS // 2)
            self._each *= 2

    def points(self) -> list[float]:
        """Return the means in the order of the steps; the last one may be over fewer steps."""
        return [*self._points, *([self._sum / self._count] if self._count else [])]
