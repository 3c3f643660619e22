"""Strategies that a search did not choose, and why: none of them is forgotten."""

from __future__ import annotations

from shardwise.plan.plan import Candidate, Rejected
from shardwise.strategy import Strategy
from shardwise.units import format_bytes


class Lost:
    """What cannot be, what does not fit and what cannot win.

    Args:
        room: bytes of a device.

    Attributes:
        rejected: all of them, with their reasons.
        smallest: of those that were predicted and do not fit, the one that needs least; None: there is none.
        unpredicted: how many were left out by their bounds.
        too_large: (least bytes, strategy) of those that do not fit by their bounds.
    """

    def __init__(self, room: int) -> None:
        self.room = room
        self.rejected: list[Rejected] = []
        self.smallest: Candidate | None = None
        self.unpredicted = 0
        self.too_large: list[tuple[float, Strategy]] = []

    def impossible(self, strategy: Strategy, reason: str, count: int = 1) -> None:
        """Notes what the model does not allow."""
        self.rejected.append(Rejected(strategy, reason, "model", count))

    def cannot_fit(self, strategy: Strategy, least: float, count: int) -> None:
        """Notes a strategy, the smallest of so many, that needs too much by its bound."""
        self.unpredicted += count
        self._too_large(strategy, least, "at least ", count)
        self.too_large.append((least, strategy))

    def cannot_win(self, strategy: Strategy, needed: str, count: int) -> None:
        """Notes a family that is slower, or larger, than what was found."""
        self.unpredicted += count
        self.rejected.append(Rejected(strategy, f"cannot win: needs {needed} at least", "slower", count))

    def fits(self, candidate: Candidate) -> bool:
        """Whether a strategy fits as predicted; noted where it does not."""
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
