"""Comparison of trainings of one workload under several strategies."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite
from typing import Any

from shardwise.run.training.result import Trained

COMPARED_STEPS = 20
"""Number of first steps whose losses are compared with those of one worker."""


def comparison(trained: Sequence[Trained], refused: Sequence[tuple[str, str]], threads: int) -> dict[str, Any]:
    """Return the document that `compare --json` prints.

    Args:
        trained: results of the trainings. The first one with one worker is the baseline of the others.
        refused: (strategy, reason) of strategies that this workload does not support.
        threads: intra-op threads of each worker.
    """
    base = next((entry for entry in trained if entry.summary["workers"] == 1), None)
    results = [_row(entry, base) for entry in trained]
    timed = [row for row in results if row["measured_seconds"] is not None]
    fastest = min(timed, key=lambda row: row["measured_seconds"], default=None)
    predicted = [row for row in results if row["predicted_seconds"] is not None]
    chosen = min(predicted, key=lambda row: row["predicted_seconds"], default=None)
    unpredicted = [entry.summary["reasons"]["predicted_seconds"] for entry in trained if not _predicted(entry)]
    reasons = {"predicted_seconds": "; ".join(dict.fromkeys(unpredicted))} if unpredicted else {}
    if chosen is None:
        reasons["chosen"] = reasons["regret"] = reasons["predicted_seconds"]
    if base is None:
        reasons["speedup"] = reasons["loss_difference"] = "no strategy with one worker to compare with"
    return {
        "workload": trained[0].summary["workload"],
        "workers": max(row["workers"] for row in results),
        "threads": threads,
        "results": results,
        "rejected": [{"strategy": strategy, "reason": reason} for strategy, reason in refused],
        "chosen": chosen and chosen["strategy"],
        "fastest": fastest and fastest["strategy"],
        "regret": _regret(chosen, fastest),
        "reasons": reasons,
    }


def _row(trained: Trained, base: Trained | None) -> dict[str, Any]:
    summary = trained.summary
    return {
        "strategy": summary["strategy"],
        "workers": summary["workers"],
        "steps": summary["steps"],
        "predicted_seconds": summary["predicted_seconds"],
        "measured_seconds": summary["step_seconds"],
        "error": summary["error"],
        "predicted_memory_bytes": summary["predicted_memory_bytes"],
        "measured_memory_bytes": summary["memory_bytes"],
        "memory_error": summary["memory_error"],
        "loss": summary["loss"],
        "first_not_finite_step": summary["first_not_finite_step"],
        "metrics": summary["metrics"],
        "samples_per_second": summary["samples_per_second"],
        "alpha": summary["alpha"],
        "exposed_alpha": summary["exposed_alpha"],
        "communication_share": summary["communication_share"],
        "speedup": base and _ratio(summary["samples_per_second"], base.summary["samples_per_second"]),
        "loss_difference": base and loss_difference(trained, base),
        "run": summary["run"],
        "notes": summary["notes"],
    }


def _predicted(trained: Trained) -> bool:
    return trained.summary["predicted_seconds"] is not None


def _regret(chosen: dict[str, Any] | None, fastest: dict[str, Any] | None) -> float | None:
    """Return the relative extra time of the strategy that was predicted to be fastest over the measured fastest.

    Returns None if one of them is not known.
    """
    if chosen is None or fastest is None or chosen["measured_seconds"] is None:
        return None
    return float(chosen["measured_seconds"] / fastest["measured_seconds"] - 1.0)


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def loss_difference(trained: Trained, base: Trained) -> float | None:
    """Return the largest relative difference of losses over the first steps. Returns None if none is finite."""
    pairs = list(zip(trained.steps[:COMPARED_STEPS], base.steps[:COMPARED_STEPS], strict=False))
    differences = [abs(ours.loss - theirs.loss) / max(abs(theirs.loss), 1e-30) for ours, theirs in pairs]
    return max((each for each in differences if isfinite(each)), default=None)
