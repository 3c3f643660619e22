"""Measure on published runs what it costs to choose the simpler of equal strategies (planner/equality.py).

    python -m benchmarks.choices

Published runs that differ in their strategies alone are a choice: one of them is chosen by its prediction, and what it
took was measured. Each row is another bound of the rule, by the share of cases in which the strategy that is predicted
faster is really faster at the bound:

    bound            relative difference up to which strategies are equal: if tp and pp agree, tp differs, pp differs
    of parts         whether the seconds by which the parts differ bound it, too, as they do in the planner
    simpler          choices that fall on a simpler strategy than the one that is predicted fastest
    predicted        how much slower these are predicted than the fastest
    measured         how much slower they were, on average, and in the worst case; negative if they were faster
    regret           measured time over that of the fastest run there was, minus one, on average over all choices
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.errors import differences, published, rated
from benchmarks.harness import environment, record
from shardwise.planner.equality import WITHIN, largest_difference
from shardwise.planner.search.problem import words
from shardwise.predict.hardware.uncertainty import kind_of_difference
from shardwise.predict.published.validate import ValidatedRun

CASES = (1 / 2, 2 / 3, 3 / 4, 0.84, 0.95)
"""Shares of cases at the bound; at one half only strategies within 1% are equal."""


def main() -> None:
    """Measure and record all bounds."""
    before = environment(1)
    every = list(choices())
    rows = [row(every, cases, of_parts) for of_parts in (True, False) for cases in CASES]
    settings = {"choices": len(every), "runs": sum(map(len, every))}
    record("choices", settings, rows, [], before)


def _bounds(cases: float) -> Mapping[str, float]:
    """Return the bounds by kind: errors are as often in favour of one strategy as of the other."""
    share = 2 * cases - 1
    return differences(share) if share else dict.fromkeys(("data", "tensor", "pipeline"), 0.0)


def choices() -> Iterator[list[ValidatedRun]]:
    """Yield the published runs of each setting that was measured under more than one strategy."""
    found: dict[Any, list[ValidatedRun]] = {}
    for run in published():
        found.setdefault(rated(run).setting, []).append(run)
    for together in found.values():
        if len({rated(run).strategy for run in together}) > 1:
            yield together


def row(every: Sequence[Sequence[ValidatedRun]], cases: float, of_parts: bool) -> dict[str, Any]:
    """Return what the choices cost under some bounds."""
    rule = _Rule(_bounds(cases), of_parts)
    chosen = [(_fastest(runs), rule.chosen(runs), min(run.run.step_seconds for run in runs)) for runs in every]
    others = [(fastest, simpler) for fastest, simpler, _ in chosen if simpler is not fastest]
    predicted = [one.prediction.step_seconds / fastest.prediction.step_seconds - 1 for fastest, one in others]
    measured = [one.run.step_seconds / fastest.run.step_seconds - 1 for fastest, one in others]
    regrets = [one.run.step_seconds / least - 1 for _, one, least in chosen]
    return {
        "right at the bound": f"{cases:.0%}",
        "bound": ", ".join(f"{rule.bounds[kind]:.1%}" for kind in ("data", "tensor", "pipeline")),
        "of parts": "yes" if of_parts else "no",
        "simpler": len(others),
        "predicted": f"{statistics.fmean(predicted):+.1%}" if others else "",
        "measured": f"{statistics.fmean(measured):+.1%}" if others else "",
        "worst": f"{max(measured):+.1%}" if others else "",
        "regret": f"{statistics.fmean(regrets):.2%}",
        "worst regret": f"{max(regrets):.1%}",
    }


def _fastest(runs: Sequence[ValidatedRun]) -> ValidatedRun:
    return min(runs, key=lambda run: run.prediction.step_seconds)


@dataclass(frozen=True, slots=True)
class _Rule:
    """The planner's rule with other bounds by kind, and with or without that of the parts."""

    bounds: Mapping[str, float]
    of_parts: bool

    def chosen(self, runs: Sequence[ValidatedRun]) -> ValidatedRun:
        """Return the simplest of the runs that are equal to the one that is predicted fastest."""
        best = _fastest(runs)
        equal = [run for run in runs if self._are_equal(run, best)]
        return min(equal, key=lambda run: (words(run.run.strategy), run.prediction.step_seconds))

    def _are_equal(self, run: ValidatedRun, best: ValidatedRun) -> bool:
        error = self.bounds[kind_of_difference(run.run.strategy, best.run.strategy)]
        most = largest_difference(run.prediction, best.prediction, error) if self.of_parts else max(WITHIN, error)
        return run.prediction.step_seconds <= (1 + most) * best.prediction.step_seconds


if __name__ == "__main__":
    main()
