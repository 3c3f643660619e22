"""Text of a validation: errors by group, the worst rows term by term, and the skipped rows."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from shardwise.reports.text import UNKNOWN, table
from shardwise.units import format_seconds

SKIPPED_SHOWN = 10


def accuracy_table(document: Mapping[str, Any]) -> str:
    """Format the errors as a table with one row per group and one for all, then the worst and the skipped rows."""
    header = ["group", "rows", "mean", "median", "90th percentile", "bias", "rank correlation", "memory"]
    rows = [[name or "(no group)", *_cells(group)] for name, group in document["groups"].items()]
    rows.append(["all rows", *_cells({**document, "bias": None, "rank_correlation": None, "memory_mean_error": None})])
    skipped = document["skipped_rows"]
    lines = [
        table(header, rows),
        "",
        f"Mean over groups of their mean absolute error: {document['mean_of_groups']:.1%}.",
        "",
        "The worst rows:",
        *(_worst(row) for row in document["worst"]),
        *([f"Skipped {len(skipped)} {'row' if len(skipped) == 1 else 'rows'}:"] if skipped else []),
        *(f"  line {row['line']}: {row['reason']}" for row in skipped[:SKIPPED_SHOWN]),
        *([f"  and {len(skipped) - SKIPPED_SHOWN} more"] if len(skipped) > SKIPPED_SHOWN else []),
    ]
    return "\n".join(lines)


def _cells(group: Mapping[str, Any]) -> list[str]:
    correlation = group["rank_correlation"]
    return [
        str(group["rows"]),
        *(_share(group[name]) for name in ("mean_error", "median_error", "p90_error")),
        UNKNOWN if group["bias"] is None else f"{group['bias']:+.1%}",
        UNKNOWN if correlation is None else f"{correlation:.3f}",
        _share(group["memory_mean_error"]),
    ]


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{value:.1%}"


def _worst(row: Mapping[str, Any]) -> str:
    terms = ", ".join(f"{name} {format_seconds(value)}" for name, value in row["terms"].items() if value > 0)
    predicted, measured = (format_seconds(row[key]) for key in ("predicted_seconds", "measured_seconds"))
    return (
        f"  line {row['line']} ({row['group'] or 'no group'}): {row['run']}: {predicted} predicted, "
        f"{measured} measured ({row['error']:+.0%}): {terms}"
    )
