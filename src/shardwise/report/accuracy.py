"""What a person reads of `shardwise validate`: errors by group, the worst rows term by term, what was skipped."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.report.text import table
from shardwise.units import format_seconds

HEADER = ("group", "rows", "mean", "median", "p90", "bias", "rank", "best is", "memory")
WORST = 5
"""Rows that are explained."""


def accuracy_table(document: Mapping[str, Any]) -> str:
    """Errors by group and the worst rows, for a terminal."""
    parts = [table(HEADER, group_rows(document)), "", *_worst_lines(document)]
    if document["skipped"]:
        parts += ["", f"{document['skipped_rows']} rows skipped:"]
        parts += [f"  line {row['line']}: {row['reason']}" for row in document["skipped"]]
    return "\n".join(parts)


def group_rows(document: Mapping[str, Any]) -> list[list[str]]:
    """Cells of the table of errors by group, with a last row over all."""
    rows = [[name, *_cells(group)] for name, group in document["groups"].items()]
    rows.append(["all rows", str(document["rows"]), *map(share, _errors(document)), "", "", "", ""])
    rows.append(["mean of groups", "", share(document["mean_error_of_groups"]), *[""] * 6])
    return rows


def _cells(group: Mapping[str, Any]) -> list[str]:
    rank = group["rank_correlation"]
    return [
        str(group["rows"]),
        *map(share, _errors(group)),
        f"{group['bias'] * 100:+.1f}%",
        "-" if rank is None else f"{rank:.3f}",
        f"{group['place_of_best']}.",
        share(group["memory_mean_error"]),
    ]


def _errors(document: Mapping[str, Any]) -> Sequence[float | None]:
    return document["mean_error"], document["median_error"], document["p90_error"]


def share(value: float | None) -> str:
    """0.0512 -> '5.1%'; a dash for None."""
    return "-" if value is None else f"{value * 100:.1f}%"


def worst(document: Mapping[str, Any], count: int = WORST) -> list[Mapping[str, Any]]:
    """The rows that are furthest off."""
    return sorted(document["predictions"], key=lambda row: -row["error"])[:count]


def explanation(row: Mapping[str, Any]) -> str:
    """The terms of a prediction in words, largest first."""
    terms = sorted(row["terms"].items(), key=lambda term: -term[1])
    return ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in terms if seconds > 0)


def _worst_lines(document: Mapping[str, Any]) -> list[str]:
    lines = ["Furthest off:"]
    for row in worst(document):
        lines.append(
            f"  line {row['line']}, {row['group']}: {row['run']}: measured {format_seconds(row['measured_seconds'])}, "
            f"predicted {format_seconds(row['predicted_seconds'])} ({row['signed_error'] * 100:+.0f}%)"
        )
        lines.append(f"      {explanation(row)}")
    return lines
