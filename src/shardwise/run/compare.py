"""Trainings of one workload under several strategies, side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.run.result import NOT_PREDICTED, Trained

COMPARED_STEPS = 20
"""First steps whose losses are held against those of one worker."""


def comparison(trained: Sequence[Trained], refused: Sequence[tuple[str, str]], threads: int) -> dict[str, Any]:
    """The document that `compare --json` prints.

    The first training with one worker is what others are held against. `refused` has (strategy, reason).
    """
    base = next((entry for entry in trained if entry.summary["workers"] == 1), None)
    results = [_row(entry, base) for entry in trained]
    timed = [row for row in results if row["measured_seconds"] is not None]
    fastest = min(timed, key=lambda row: row["measured_seconds"], default=None)
    reasons = {"chosen": NOT_PREDICTED, "regret": NOT_PREDICTED, "predicted_seconds": NOT_PREDICTED}
    if base is None:
        reasons["speedup"] = reasons["loss_difference"] = "no strategy with one worker to compare with"
    return {
        "workload": trained[0].summary["workload"],
        "workers": max(row["workers"] for row in results),
        "threads": threads,
        "results": results,
        "rejected": [{"strategy": strategy, "reason": reason} for strategy, reason in refused],
        "chosen": None,
        "fastest": fastest and fastest["strategy"],
        "regret": None,
        "reasons": reasons,
    }


def _row(trained: Trained, base: Trained | None) -> dict[str, Any]:
    summary = trained.summary
    return {
        "strategy": summary["strategy"],
        "workers": summary["workers"],
        "steps": summary["steps"],
        "predicted_seconds": None,
        "measured_seconds": summary["step_seconds"],
        "error": None,
        "predicted_memory_bytes": None,
        "measured_memory_bytes": summary["memory_bytes"],
        "loss": summary["loss"],
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


def _ratio(value: float | None, base: float | None) -> float | None:
    return value / base if value and base else None


def loss_difference(trained: Trained, base: Trained) -> float | None:
    """The largest relative difference between the losses of the first steps; None where there is no finite one."""
    pairs = list(zip(trained.steps[:COMPARED_STEPS], base.steps[:COMPARED_STEPS], strict=False))
    differences = [abs(ours.loss - theirs.loss) / max(abs(theirs.loss), 1e-30) for ours, theirs in pairs]
    return max(differences, default=None)
