"""What a search found: the ranked strategies, the chosen one, and why the others lost."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.plan.wish import Wish
from shardwise.predict.judging import Judged
from shardwise.predict.prediction import Prediction
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Candidate:
    """A strategy and what it will cost.

    Attributes:
        strategy: the strategy.
        prediction: of it; the memory is that of the dry run where there was one.
        dry_run: of the worker that needs most memory; None: it was not run.
    """

    strategy: Strategy
    prediction: Prediction
    dry_run: Judged | None = None


@dataclass(frozen=True, slots=True)
class Rejected:
    """A strategy, or a family of them, that was not chosen.

    Attributes:
        strategy: the strategy; for a family its first member.
        reason: why, in words.
        kind: `model` (cannot be for this model), `memory`, `slower`, or `wish` (was not asked for).
        count: how many strategies it stands for.
    """

    strategy: Strategy
    reason: str
    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """The outcome of a search.

    Attributes:
        workload: its name.
        cluster: its name.
        workers: devices that it is for.
        wish: what was asked for.
        candidates: that fit, best first; those behind the first few are known from scaled profiles alone.
        rejected: all others.
        smallest: of those that do not fit, the one that needs least memory; None where all fit.
        seconds: that the search took.
        looked_at: strategies that were predicted.
        left_out: strategies that could not win by their bounds.
    """

    workload: str
    cluster: str
    workers: int
    wish: Wish
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    smallest: Candidate | None
    seconds: float
    looked_at: int
    left_out: int

    @property
    def best(self) -> Candidate | None:
        """The chosen one; None where nothing fits."""
        return self.candidates[0] if self.candidates else None
