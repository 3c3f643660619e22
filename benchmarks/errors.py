"""Write the table of relative errors that ranges of predictions rest on: predict/hardware/errors.json.

    python -m benchmarks.errors

errors       For GPUs by their datasheets: the error that nine in ten published runs keep, each group of runs with equal
             weight, times the ratio of the errors of cross-validation to those of the fit, because constants were
             fitted to these very runs. For machines that were measured: the error that nine in ten rows of
             benchmarks/results/this-machine.json keep whose workers have a core each; where they have not, the scatter
             of equal steps is far larger and counts by itself.

differences  The error of the ratio of two predicted step times that one in three pairs of runs keep, by the axis whose
             degrees differ; the planner's choice rests on it (planner/equality.py). A pair are two runs of one group
             with equal model, batch, cluster, precision and software under different strategies, predicted to differ
             by a quarter at most: the planner does not hesitate between others. Each group has equal weight, and this
             machine's runs are a group. Nothing makes up for the fit here: constants fitted to fewer runs would err
             alike for both runs of a pair, and where they do not, the smaller table makes the planner follow the
             faster prediction.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from pathlib import Path
from typing import Any

from shardwise.predict.hardware import uncertainty
from shardwise.predict.hardware.constants import fit_record
from shardwise.predict.published.validate import ValidatedRun, validated_runs
from shardwise.strategy import Strategy

HERE = Path(__file__).parent
RUNS = HERE.parent / "tests" / "published" / "runs.csv"
MEASURED = HERE / "results" / "this-machine.json"
TABLE = Path(uncertainty.__file__).with_name("errors.json")
NINE_IN_TEN, ONE_IN_THREE = 0.9, 1 / 3

CLOSE = 0.25
"""Largest predicted relative difference of a pair of runs."""


@dataclass(frozen=True, slots=True)
class Rated:
    """A run with its prediction.

    Attributes:
        group: group of runs that it belongs to.
        setting: all that runs must have in common to be compared by their strategies.
        strategy: the strategy, with what else may differ between strategies.
        predicted: predicted seconds of a step.
        measured: measured seconds of a step.
    """

    group: str
    setting: Hashable
    strategy: tuple[Strategy, Hashable]
    predicted: float
    measured: float


@dataclass(frozen=True, slots=True)
class Pair:
    """Two runs that differ in their strategies alone, as relative differences.

    Attributes:
        group: group of runs that they belong to.
        kind: kind of their difference.
        predicted: how much longer the slower of them is predicted to take.
        error: absolute error of the ratio of their step times.
    """

    group: str
    kind: str
    predicted: float
    error: float


def main() -> None:
    """Write the table."""
    table = {"written_by": "python -m benchmarks.errors", "errors": _errors(), "differences": _differences()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")
    print(TABLE.read_text(), end="")


def _errors() -> dict[str, float]:
    held = published()
    fit = fit_record()
    unseen = fit["held_out_mean_of_groups"] / fit["mean_of_groups"]
    rows = [(_kind(each), each.run.group, abs(each.error)) for each in held]
    found = {
        kind: unseen * kept([row[1:] for row in rows if row[0] == kind], NINE_IN_TEN)
        for kind in sorted({row[0] for row in rows})
    }
    found["measured"] = kept([("", abs(each.predicted / each.measured - 1)) for each in this_machine()], NINE_IN_TEN)
    return {kind: round(value, 3) for kind, value in found.items()}


def _kind(held: ValidatedRun) -> str:
    return uncertainty.kind_of(held.run.strategy.tp, held.run.strategy.pp)


def _differences() -> dict[str, dict[str, float]]:
    every, found = close_pairs(), differences(ONE_IN_THREE)
    return {
        kind: {"error": round(error, 3), "pairs": sum(pair.kind == kind for pair in every)}
        for kind, error in found.items()
    }


def differences(share: float) -> dict[str, float]:
    """Return the error of a difference that a share of the pairs keep, by kind."""
    every = close_pairs()
    kinds = sorted({pair.kind for pair in every})
    return {kind: kept([(pair.group, pair.error) for pair in every if pair.kind == kind], share) for kind in kinds}


@cache
def close_pairs() -> list[Pair]:
    """Return the pairs of runs between which the planner may hesitate."""
    return [pair for pair in pairs([*map(rated, published()), *this_machine()]) if pair.predicted <= CLOSE]


@cache
def published() -> list[ValidatedRun]:
    """Return the published runs that can be predicted."""
    return validated_runs(RUNS)[0]


def rated(held: ValidatedRun) -> Rated:
    """Return a published run as one to compare."""
    run, how = held.run, held.run.how
    cluster = (run.cluster.name, run.cluster.size, run.cluster.device(0).name)
    computed = (how.dtype, how.linear_dtype, how.scaling, how.runtime, how.context)
    return Rated(
        group=run.group,
        setting=(run.group, run.sizes, cluster, computed, run.batch_size),
        strategy=(run.strategy, (how.micro_batch, how.recompute, how.sequence_parallel)),
        predicted=held.prediction.step_seconds,
        measured=run.step_seconds,
    )


def this_machine() -> list[Rated]:
    """Return the runs of this machine whose workers have a core each."""
    found: dict[str, Any] = json.loads(MEASURED.read_text())
    return [
        Rated(
            group="this machine",
            setting=(row["workload"], row["workers"]),
            strategy=(Strategy.parse(row["strategy"]), None),
            predicted=row["predicted ms"],
            measured=row["measured ms"],
        )
        for row in found["rows"]
        if row["workers"] <= found["cpus"]
    ]


def settings(runs: Sequence[Rated]) -> list[list[Rated]]:
    """Group runs that differ in their strategies alone."""
    found: dict[Hashable, list[Rated]] = {}
    for run in runs:
        found.setdefault(run.setting, []).append(run)
    return list(found.values())


def pairs(runs: Sequence[Rated]) -> Iterator[Pair]:
    """Yield all pairs of runs that differ in their strategies alone."""
    for together in settings(runs):
        for one, other in combinations(together, 2):
            if one.strategy != other.strategy:
                yield _pair(one, other)


def _pair(one: Rated, other: Rated) -> Pair:
    predicted, measured = one.predicted / other.predicted, one.measured / other.measured
    return Pair(
        group=one.group,
        kind=uncertainty.kind_of_difference(one.strategy[0], other.strategy[0]),
        predicted=max(predicted, 1 / predicted) - 1,
        error=math.expm1(abs(math.log(predicted / measured))),
    )


def kept(rows: Sequence[tuple[str, float]], share: float) -> float:
    """Return the error that a share of the rows keep, each group with equal weight; rows are (group, error)."""
    sizes = Counter(group for group, _ in rows)
    seen = 0.0
    for group, error in sorted(rows, key=lambda row: row[1]):
        seen += 1 / sizes[group] / len(sizes)
        if seen >= share - 1e-9:
            return error
    raise AssertionError("no rows")


if __name__ == "__main__":
    main()
