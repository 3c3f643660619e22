"""Result of a search: the ranked strategies, the chosen one, and the reasons against the others."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.planner.constraints import Constraints
from shardwise.predict.crosscheck import Crosscheck
from shardwise.predict.prediction import Prediction
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Candidate:
    """A strategy with its predicted cost.

    Attributes:
        strategy: the strategy.
        prediction: predicted cost; the memory is that of the dry run if there was one.
        dry_run: dry run of the worker that needs most memory. None if there was no dry run.
    """

    strategy: Strategy
    prediction: Prediction
    dry_run: Crosscheck | None = None


@dataclass(frozen=True, slots=True)
class Offer:
    """A means that makes training cheaper by changing it, see `planner.means`.

    Attributes:
        means: the means as a strategy spells it.
        candidate: fastest strategy with it.
    """

    means: str
    candidate: Candidate

    @property
    def changes(self) -> tuple[str, ...]:
        """Return what it changes, as `--allow` names it."""
        return self.candidate.strategy.changes


@dataclass(frozen=True, slots=True)
class Rejected:
    """A strategy, or a family of strategies, that was not chosen.

    Attributes:
        strategy: the strategy; for a family, one of its members.
        reason: reason in words.
        kind: `model` (impossible for this model), `memory`, `slower`, or `wish` (excluded by the user).
        count: number of strategies that it stands for.
    """

    strategy: Strategy
    reason: str
    kind: str
    count: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Outcome of a search.

    Attributes:
        workload: name of the workload.
        cluster: name of the cluster.
        workers: number of devices.
        constraints: objective and constraints.
        candidates: strategies that fit, best first; all but the first few are predicted from scaled profiles alone.
        rejected: all other strategies.
        smallest: the strategy that needs least memory among those that do not fit. None if all fit.
        seconds: duration of the search.
        looked_at: number of strategies that were predicted.
        left_out: number of strategies that were skipped by their bounds.
        notes: remarks on the workload.
        offers: means that change training, and what each would bring here; empty for one worker.
    """

    workload: str
    cluster: str
    workers: int
    constraints: Constraints
    candidates: tuple[Candidate, ...]
    rejected: tuple[Rejected, ...]
    smallest: Candidate | None
    seconds: float
    looked_at: int
    left_out: int
    notes: tuple[str, ...] = ()
    offers: tuple[Offer, ...] = ()

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate. None if nothing fits."""
        return self.candidates[0] if self.candidates else None

    @property
    def fastest(self) -> Candidate | None:
        """The candidate with the shortest predicted step; not the chosen one if an equal one is simpler or smaller."""
        return min(self.candidates, key=lambda each: each.prediction.step_seconds, default=None)
