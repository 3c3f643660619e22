"""Panel of the rank x step heat map, and what kind of slowness it shows."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

from shardwise.reports.page.entry import Entry
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import number, numbers
from shardwise.units import format_seconds

SLOW = 1.15
"""Times the usual busy time from which a rank or a step counts as slow."""

MOST_COLUMNS, MOST_RANKS = 160, 128
"""Largest numbers of columns and rows of the heat map; above, neighbours share a cell, which shows the slowest."""

LEAST_STEPS = 4
"""Number of steps from which on a pattern is told."""


@dataclass(frozen=True, slots=True)
class Busy:
    """Busy seconds of all ranks over the steps.

    Attributes:
        steps: numbers of the steps.
        seconds: for each step the busy seconds of each rank.
    """

    steps: tuple[int, ...]
    seconds: tuple[tuple[float, ...], ...]

    @property
    def ranks(self) -> int:
        """Return the number of ranks."""
        return len(self.seconds[0])

    def usual_of_ranks(self) -> list[float]:
        """Return the median busy seconds of each rank."""
        return [median(step[rank] for step in self.seconds) for rank in range(self.ranks)]

    def slow_ranks(self) -> list[tuple[int, float]]:
        """Return (rank, times the usual) of the ranks that are slow in most steps, slowest first."""
        usual = self.usual_of_ranks()
        middle = median(usual)
        found = [(rank, own / middle) for rank, own in enumerate(usual) if middle > 0 and own / middle >= SLOW]
        return sorted(found, key=lambda each: -each[1])

    def slow_steps(self) -> list[tuple[int, float]]:
        """Return (step, times the usual) of the steps in which all ranks are slow, slowest first."""
        middles = [median(step) for step in self.seconds]
        usual = median(middles)
        found = [
            (n, own / usual) for n, own in zip(self.steps, middles, strict=True) if usual > 0 and own / usual >= SLOW
        ]
        return sorted(found, key=lambda each: -each[1])

    def stragglers(self) -> list[int]:
        """Return the rank that is slow in each step in which a single one is, in the order of the steps."""
        usual = self.usual_of_ranks()
        found = []
        for step in self.seconds:
            ratios = [own / each if each > 0 else 1.0 for own, each in zip(step, usual, strict=True)]
            worst = max(range(len(step)), key=lambda rank: ratios[rank])
            if ratios[worst] >= SLOW * median(ratios):
                found.append(worst)
        return found


def busy_of(entry: Entry) -> Busy | None:
    """Return the busy seconds of a run's ranks. Returns None if they were not recorded.

    Lines with another number of ranks than the last one are of another run in this folder, and left out.
    """
    found = []
    for line in entry.ranks:
        step, seconds = number(line, "step"), numbers(line, "busy_seconds")
        if step is not None and seconds and all(value is not None for value in seconds):
            found.append((int(step), tuple(value for value in seconds if value is not None)))
    found = [each for each in found if len(each[1]) == len(found[-1][1])]
    return Busy(tuple(step for step, _ in found), tuple(seconds for _, seconds in found)) if found else None


def pattern(busy: Busy) -> str:
    """Say which kind of slowness the busy seconds show."""
    if busy.ranks == 1:
        return "There is one rank: nothing to compare."
    if len(busy.steps) < LEAST_STEPS:
        return f"{len(busy.steps)} steps were recorded, too few to tell a pattern."
    ranks, steps, stragglers = busy.slow_ranks(), busy.slow_steps(), busy.stragglers()
    told = []
    if ranks:
        rank, times = ranks[0]
        others = f", and {len(ranks) - 1} more ranks are slow" if len(ranks) > 1 else ""
        told.append(f"Rank {rank} is slow in most steps: it works {times:.2g} times as long as the others{others}.")
    if steps:
        step, times = steps[0]
        others = f", as in {len(steps) - 1} more steps" if len(steps) > 1 else ""
        told.append(f"In step {step} all ranks were slow, {times:.2g} times the usual{others}.")
    if len(set(stragglers)) > 1 and len(stragglers) > len(busy.steps) / 4:
        often = Counter(stragglers).most_common(1)[0][1]
        told.append(
            f"The straggler changes: in {len(stragglers)} of {len(busy.steps)} steps a single rank was late, never the "
            f"same one in more than {often}."
        )
    return " ".join(told) or "All ranks work about equally long in all steps."


def ranks_panel(entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel; None if nothing was run."""
    ran = [entry for entry in entries if entry.was_run]
    if not ran:
        return None
    views = tuple(_view(entry, busy) for entry in ran if (busy := busy_of(entry)) is not None)
    why = ran[0].reason("ranks", "the run's folder has no ranks.jsonl")
    missing = "" if views else f"How long each rank worked in each step is not known: {why}."
    return ReportPanel(
        name="ranks", title="Is one worker slower than the others?", short="Workers", views=views, missing=missing
    )


def _view(entry: Entry, busy: Busy) -> View:
    cells, columns, rows = _cells(busy)
    usual = busy.usual_of_ranks()
    notes = []
    if len(columns) < len(busy.steps) or len(rows) < busy.ranks:
        notes.append(
            f"{len(busy.steps):,} steps of {busy.ranks:,} ranks: a cell shows the slowest of up to "
            f"{-(-len(busy.steps) // len(columns))} steps and {-(-busy.ranks // len(rows))} ranks."
        )
    return View(
        label=entry.label,
        words=(
            pattern(busy),
            "Darker is longer. A dark row is a slow worker, a dark column a slow step, scattered dark cells a "
            "straggler that changes.",
        ),
        charts=(
            {
                "kind": "heat",
                "columns": columns,
                "rows": rows,
                "cells": cells,
                "name": "seconds that a rank works in a step",
            },
        ),
        header=("rank", "usual", "longest", "times the usual of all"),
        rows=[
            [
                str(rank),
                format_seconds(own),
                format_seconds(max(step[rank] for step in busy.seconds)),
                f"{own / (median(usual) or 1.0):.2f}",
            ]
            for rank, own in enumerate(usual)
        ],
        notes=tuple(notes),
    )


def _cells(busy: Busy) -> tuple[list[list[Any]], list[str], list[str]]:
    """Return the cells [column, row, seconds] of the map, and the names of its columns and rows."""
    wide, high = -(-len(busy.steps) // MOST_COLUMNS), -(-busy.ranks // MOST_RANKS)
    found: dict[tuple[int, int], float] = {}
    for place, step in enumerate(busy.seconds):
        for rank, seconds in enumerate(step):
            key = place // wide, rank // high
            found[key] = max(found.get(key, 0.0), seconds)
    columns = [str(busy.steps[start]) for start in range(0, len(busy.steps), wide)]
    rows = [f"rank {start}" for start in range(0, busy.ranks, high)]
    return [[column, row, seconds] for (column, row), seconds in found.items()], columns, rows
