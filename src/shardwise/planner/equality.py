"""Rule by which a plan calls two strategies equal, and which of equal ones it chooses: the simpler.

Two strategies on one cluster run on the same devices and links. If a rate is predicted wrong, it is wrong for both, and
their order stays right. So the range of one prediction says little about the order of two. It depends on

    the difference    how far the ratio of two predicted step times is off, measured on pairs of runs that differ in
                      their strategies alone (`difference_error`)
    what differs      seconds that both spend alike cannot change their order. Only those by which their parts differ
                      can (computing, waiting for communication, ...), by the error of such predictions

Two strategies are equal if their step times differ by less than either allows, or by at most `WITHIN`, which nobody
notices: repeated measurements scatter as much. If no error is known, `WITHIN` alone counts.

At the bound of the difference, the strategy that is predicted faster is really faster in two of three cases, and below
it in fewer. The wider range that nine in ten keep would be the wrong bound: predictions are right on average, so a step
that is predicted 10% longer does take 10% longer on average, however wide its range is. So the bound is a price. At two
of three cases it is 2% to 7% by kind, which is the most that a choice may cost on average, and it buys fewer axes and
options, each of which can be wrong in ways that no prediction knows of. `benchmarks/choices.py` measures the price on
published runs.
"""

from __future__ import annotations

from shardwise.planner.plan import Candidate
from shardwise.predict.document import PARTS
from shardwise.predict.hardware.uncertainty import difference_error
from shardwise.predict.prediction import Prediction

WITHIN = 0.01
"""Relative difference of two step times, or of two sizes of memory, up to which they are equal."""


def are_equal(one: Candidate, other: Candidate) -> bool:
    """Return whether predictions cannot tell which of two strategies on one cluster is faster."""
    faster, slower = sorted(each.prediction.step_seconds for each in (one, other))
    error = difference_error(one.strategy, other.strategy)
    return slower - faster <= faster * largest_difference(one.prediction, other.prediction, error)


def largest_difference(one: Prediction, other: Prediction, error: float) -> float:
    """Return the relative difference of step times up to which two strategies are equal.

    Args:
        one: prediction of a strategy.
        other: prediction of the other one, on the same cluster.
        error: relative error of their difference.
    """
    errors = [each.error for each in (one, other) if each.error is not None]
    if not errors:
        return WITHIN
    differing: float = sum(abs(getattr(one, part) - getattr(other, part)) for part in PARTS)
    share = differing / min(one.step_seconds, other.step_seconds)
    return max(WITHIN, min(error, max(errors) * share))
