"""Holds the predictor against runs that were measured: the document of `shardwise validate`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from shardwise.predict.constants import Constants, constants
from shardwise.predict.prediction import Prediction
from shardwise.predict.published import summary
from shardwise.predict.published.row import Run
from shardwise.predict.published.table import read_runs
from shardwise.predict.transformer.step import Clock, explained, predict


def validate(path: Path | str, numbers: Constants | None = None) -> dict[str, Any]:
    """Predicts every run of a table and compares.

    Args:
        path: a CSV with one run a row; columns as in `tests/published/README.md`.
        numbers: constants of the cost model; those that were fitted if left out.

    Returns:
        `{"rows", "skipped": [{"line", "group", "reason"}], "skipped_rows", "mean_error", "median_error", "p90_error",
        "mean_error_of_groups", "groups", "predictions"}`; errors are |predicted - measured| / measured of the step time.

    Raises:
        DataError: the file cannot be read, or has not the columns of a table of runs.
    """
    runs, skipped = read_runs(path)
    rows = [_row(run, prediction) for run, prediction in zip(runs, predictions(runs, numbers), strict=True)]
    groups = {
        name: _group([row for row in rows if row["group"] == name]) for name in dict.fromkeys(r.group for r in runs)
    }
    means = [group["mean_error"] for group in groups.values()]
    return {
        "rows": len(rows),
        "skipped": [asdict(row) for row in skipped],
        "skipped_rows": len(skipped),
        **_errors(rows),
        "mean_error_of_groups": summary.mean(means),
        "groups": groups,
        "predictions": rows,
    }


def predictions(runs: Sequence[Run], numbers: Constants | None = None) -> list[Prediction]:
    """The prediction of each run. Kernels that several runs on one kind of device have in common are computed once."""
    numbers = numbers or constants()
    clocks: dict[str, Clock] = {}
    result = []
    for run in runs:
        device = run.cluster.device(0)
        clock = clocks.setdefault(device.name, Clock(run.cluster, device, numbers))
        result.append(predict(run.sizes, run.setup, run.cluster, numbers, clock))
    return result


def _row(run: Run, prediction: Prediction) -> dict[str, Any]:
    error = prediction.step_seconds / run.step_seconds - 1
    memory = prediction.memory.total if run.memory_bytes else None
    return {
        "line": run.line,
        "group": run.group,
        "run": run.label,
        "measured_seconds": run.step_seconds,
        "predicted_seconds": prediction.step_seconds,
        "error": abs(error),
        "signed_error": error,
        "terms": dict(explained(prediction)),
        "finer_terms": dict(prediction.terms),
        "measured_memory_bytes": run.memory_bytes,
        "predicted_memory_bytes": memory,
        "memory_error": abs(memory / run.memory_bytes - 1) if memory and run.memory_bytes else None,
    }


def _errors(rows: Sequence[dict[str, Any]]) -> dict[str, float | None]:
    errors = [row["error"] for row in rows]
    return {
        "mean_error": summary.mean(errors),
        "median_error": summary.percentile(errors, 0.5),
        "p90_error": summary.percentile(errors, 0.9),
    }


def _group(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    measured = [row["measured_seconds"] for row in rows]
    predicted = [row["predicted_seconds"] for row in rows]
    memory = [row["memory_error"] for row in rows if row["memory_error"] is not None]
    return {
        "rows": len(rows),
        **_errors(rows),
        "bias": summary.mean([row["signed_error"] for row in rows]),
        "rank_correlation": summary.rank_correlation(measured, predicted),
        "place_of_best": summary.place_of_best(measured, predicted),
        "memory_rows": len(memory),
        "memory_mean_error": summary.mean(memory),
    }
