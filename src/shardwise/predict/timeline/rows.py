"""Rows of a timeline, predicted or measured: as many as a report can show."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from typing import Any

MOST_ROWS = 10_000
"""Largest number of rows that a file has of one step."""

Row = dict[str, Any]


def longest(rows: Sequence[Row], count: int) -> tuple[list[Row], int]:
    """Return the `count` longest rows in order of their start, and the number of those left out."""
    if len(rows) <= count:
        return list(rows), 0
    kept = heapq.nlargest(count, rows, key=lambda row: row["seconds"])
    return sorted(kept, key=lambda row: row["start_seconds"]), len(rows) - count
