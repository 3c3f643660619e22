"""Strategies that a search did not choose, each with its reason."""

from __future__ import annotations

from shardwise.planner.plan import Candidate, Rejected
from shardwise.strategy import Strategy
from shardwise.units import format_bytes


class Rejections:
    """Strategies that are impossible, do not fit or cannot win.

    Args:
        room: bytes of a device that a strategy may use.

    Attributes:
        rejected: all of these strategies, with their reasons.
        smallest: the predicted strategy that needs least memory among those that do not fit. None if there is none.
        unpredicted: number of strategies that were skipped by their bounds.
        too_large: (least bytes, strategy) of strategies that do not fit by their bounds.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.rejected: list[Rejected] = []
        self.smallest: Candidate | None = None
        self.unpredicted = 0
        self.too_large: list[tuple[float, Strategy]] = []

    def impossible(self, strategy: Strategy, reason: str, count: int = 1) -> None:
        """Record a strategy that the model does not allow, standing for `count` strategies."""
        self.rejected.append(Rejected(strategy, reason, "model", count))

    def cannot_fit(self, strategy: Strategy, least: float, count: int) -> None:
        """Record the smallest of `count` strategies, which needs too much memory by its bound of `least` bytes."""
        self.unpredicted += count
        self._too_large(strategy, least, "at least ", count)
        self.too_large.append((least, strategy))

    def cannot_win(self, strategy: Strategy, needed: str, count: int) -> None:
        """Record a family of `count` strategies that is slower, or larger, than the best found."""
        self.unpredicted += count
        self.rejected.append(Rejected(strategy, f"cannot win: needs {needed} at least", "slower", count))

    def fits(self, candidate: Candidate) -> bool:
        """Return whether a strategy fits as predicted, and record it if it does not."""
        memory = candidate.prediction.memory.total
        if memory <= self.room:
            return True
        if self.smallest is None or memory < self.smallest.prediction.memory.total:
            self.smallest = candidate
        self._too_large(candidate.strategy, memory, "")
        return False

    def _too_large(self, strategy: Strategy, size: float, least: str, count: int = 1) -> None:
        reason = f"needs {least}{format_bytes(size)} of a device, there are {format_bytes(self.room)}"
        self.rejected.append(Rejected(strategy, reason, "memory", count))
