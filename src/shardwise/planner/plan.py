"""Result of a search: the ranked strategies, the chosen one, and the reasons against the others."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.planner.constraints import Constraints
from shardwise.predict.crosscheck import Crosscheck
from shardwise.predict.document import PARTS
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

    @property
    def best(self) -> Candidate | None:
        """The chosen candidate. None if nothing fits."""
        return self.candidates[0] if self.candidates else None


def are_equal(one: Prediction, other: Prediction) -> bool:
    """Return whether the step times of two strategies on one cluster differ by less than predictions can tell apart.

    Both run the same kernels on the same devices over the same links. If a rate is predicted wrong, it is wrong for
    both, so that what they have in common errs alike and does not change their order. Only the seconds by which their
    parts differ can. Two strategies are equal if their step times differ by at most the relative error of these
    seconds: where one waits for communication and the other for its pipeline, say, and both for nearly as long.
    """
    errors = [each.error for each in (one, other) if each.error is not None]
    if not errors:
        return False
    differing: float = sum(abs(getattr(one, part) - getattr(other, part)) for part in PARTS)
    return abs(one.step_seconds - other.step_seconds) <= max(errors) * differing
