"""Comparison of predictions with a table of measured runs: what `shardwise validate` computes."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.errors import DataError, RequestError, one_line
from shardwise.files import read_regular_text
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.hardware.constants import constants, documented, fit_record
from shardwise.predict.prediction import Prediction
from shardwise.predict.published.columns import MissingColumn, named, text
from shardwise.predict.published.memory_kind import memory_terms
from shardwise.predict.published.row import PublishedRun, read
from shardwise.predict.published.statistics import (
    mean,
    percentile,
    place_of_best,
    rank_correlation,
    rank_correlation_of_scatter,
)

LARGEST = 64 << 20
"""Largest size of a table's file in bytes."""

WORST = 5
"""Number of rows with the largest errors that the document lists."""

RANKED_ROWS = 10
"""Least number of rows of a group for a rank correlation."""


@dataclass(frozen=True, slots=True)
class ValidatedRun:
    """A measured run and its prediction.

    Attributes:
        run: the run.
        prediction: the predicted step.
        memory: predicted bytes by category, counted as the run's source counts memory.
    """

    run: PublishedRun
    prediction: Prediction
    memory: Mapping[str, float]

    @property
    def error(self) -> float:
        """Return the relative error of the step's time; negative if the prediction is too low."""
        return self.prediction.step_seconds / self.run.step_seconds - 1

    @property
    def memory_error(self) -> float | None:
        """Return the relative error of the peak memory. Returns None if the row does not state it."""
        measured = self.run.memory_bytes
        return sum(self.memory.values()) / measured - 1 if measured else None


def validate(path: str | Path, *, standing: bool = False) -> dict[str, Any]:
    """Return the document of `shardwise validate`: predictions compared with measurements, per row and by group.

    Args:
        path: a CSV file with the columns of tests/published/README.md.
        standing: whether to predict Shardwise on a few runs of each group, too (`predict.published.standing`).

    Raises:
        DataError: the file cannot be read, has no rows, or has no row that can be predicted.
    """
    held, skipped = validated_runs(path)
    document = _document(held, skipped)
    if standing:
        from shardwise.predict.published.standing import standings  # it traces models, for which it needs torch

        document["standing"] = [each.document() for each in standings([(run.run, run.prediction) for run in held])]
    return document


def validated_runs(path: str | Path) -> tuple[list[ValidatedRun], list[dict[str, Any]]]:
    """Return (runs with their predictions, rows that were skipped, each with its line, group and reason) of a table.

    Raises:
        DataError: the file cannot be read, has no rows, or has no row that can be predicted.
    """
    held, skipped = [], []
    for line, row in read_rows(Path(path)):
        try:
            run = read(row, line)
            costs = costs_of(run.profile, run.strategy, run.cluster)
            held.append(ValidatedRun(run, costs.prediction(), memory_terms(costs, run.counted, constants())))
        except (MissingColumn, RequestError) as error:
            skipped.append({"line": line, "group": text(row, "group"), "reason": one_line(str(error))})
    if not held:
        first = f": line {skipped[0]['line']}: {skipped[0]['reason']}" if skipped else ""
        raise DataError(f"{path}: no row can be predicted{first}")
    return held, skipped


def read_rows(path: Path) -> list[tuple[int, Mapping[str, str]]]:
    """Read (line number, cells by column) of each row of a file. Raises DataError if it is unreadable or empty."""
    content = read_regular_text(path, LARGEST, DataError)
    try:
        reader = csv.DictReader(io.StringIO(content.removeprefix("\ufeff"), newline=""))
        rows: list[tuple[int, Mapping[str, str]]] = []
        columns = named([name for name in reader.fieldnames or () if name is not None])
        for row in reader:
            rows.append((reader.line_num, {columns[k]: v or "" for k, v in row.items() if k in columns}))
    except (ValueError, csv.Error) as error:
        raise DataError(f"{path}: cannot be read as CSV: {error}; give a file with one run a row") from error
    if not rows:
        raise DataError(f"{path}: has no rows; give a CSV file with one run a row")
    return rows


def _document(held: Sequence[ValidatedRun], skipped: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    groups: dict[str, list[ValidatedRun]] = {}
    for each in held:
        groups.setdefault(each.run.group, []).append(each)
    errors = [abs(each.error) for each in held]
    worst = sorted(held, key=lambda each: -abs(each.error))[:WORST]
    return {
        "rows": len(held),
        "skipped": len(skipped),
        **_errors(errors),
        "groups": {name: _group(rows) for name, rows in groups.items()},
        "mean_of_groups": statistics.fmean(
            statistics.fmean(abs(each.error) for each in rows) for rows in groups.values()
        ),
        "skipped_rows": list(skipped),
        "worst": [_row(each) for each in worst],
        "predictions": [_row(each) for each in held],
        "constants": {name: dict(entry) for name, entry in documented().items()},
        "fit": dict(fit_record()),
    }


def _errors(errors: Sequence[float]) -> dict[str, float | None]:
    return {
        "mean_error": mean(errors),
        "median_error": statistics.median(errors),
        "p90_error": percentile(errors, 0.9),
    }


def _group(rows: Sequence[ValidatedRun]) -> dict[str, Any]:
    memory_errors = [abs(each.memory_error) for each in rows if each.memory_error is not None]
    groups = _repeats(rows)
    deviations = _deviations(groups)
    predicted, measured = [each.prediction.step_seconds for each in rows], [each.run.step_seconds for each in rows]
    return {
        "rows": len(rows),
        **_errors([abs(each.error) for each in rows]),
        "rank_correlation": rank_correlation(predicted, measured) if len(rows) >= RANKED_ROWS else None,
        "best_is_predicted": place_of_best(measured, predicted),
        "bias": statistics.median(each.error for each in rows),
        "memory_rows": len(memory_errors),
        "memory_mean_error": mean(memory_errors),
        "repeated_rows": len(deviations),
        "repeat_mean_deviation": mean(deviations),
        "repeat_largest_deviation": max(deviations, default=None),
        "repeat_rank_correlation": rank_correlation_of_scatter(groups) if len(rows) >= RANKED_ROWS else None,
    }


def _repeats(rows: Sequence[ValidatedRun]) -> list[list[float]]:
    """Group the measured seconds of rows that describe the same run: equal sizes, setup and cluster."""
    groups: dict[object, list[float]] = {}
    for each in rows:
        run = each.run
        key = (run.sizes, run.how, run.strategy, run.cluster.size, run.cluster.device(0).name, run.cluster.name)
        groups.setdefault(key, []).append(run.step_seconds)
    return list(groups.values())


def _deviations(groups: Sequence[Sequence[float]]) -> list[float]:
    """Return the relative deviation of each repeated measurement from the mean of its group."""
    found: list[float] = []
    for seconds in groups:
        middle = statistics.fmean(seconds)
        found += [abs(value / middle - 1) for value in seconds if len(seconds) > 1]
    return found


def explained(prediction: Prediction) -> dict[str, float]:
    """Return the terms of a step that add up to it, by name."""
    return {
        "compute": prediction.compute_seconds,
        "communication": prediction.exposed_communication_seconds,
        "bubble": prediction.bubble_seconds,
        "optimizer": prediction.optimizer_seconds,
        "host": prediction.host_seconds,
    }


def _row(held: ValidatedRun) -> dict[str, Any]:
    run, prediction = held.run, held.prediction
    return {
        "line": run.line,
        "group": run.group,
        "run": run.label,
        "predicted_seconds": prediction.step_seconds,
        "measured_seconds": run.step_seconds,
        "error": held.error,
        "terms": explained(prediction),
        "predicted_memory_bytes": round(sum(held.memory.values())),
        "measured_memory_bytes": run.memory_bytes,
        "memory_error": held.memory_error,
        "memory_terms": dict(held.memory),
        "memory_counted": run.counted.kind,
        "assumed": list(run.assumed),
    }
