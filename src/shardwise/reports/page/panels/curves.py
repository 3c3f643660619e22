"""Panels of the loss and metric curves, laid over each other."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from shardwise.reports.page.colours import series_colour
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, amounts, number
from shardwise.units import format_seconds

MOST_POINTS = 600
"""Largest number of points of a curve; above, each point is the mean of neighbours."""

MOST_LINES = 10

Point = tuple[float, float]


def curves_panel(entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel; None if nothing was run."""
    ran = [entry for entry in entries if entry.was_run]
    if not ran:
        return None
    shown = [entry for entry in ran if entry.steps]
    if not shown:
        return ReportPanel(
            name="curves", title="Does it learn?", short="Learning", missing="No step was completed: there is no loss."
        )
    views = [_losses(shown[:MOST_LINES])]
    names = dict.fromkeys(name for entry in shown for line in entry.evaluations for name in amounts(line, "evaluation"))
    views += [_metric(name, shown[:MOST_LINES]) for name in names]
    views.append(_speeds(shown[:MOST_LINES]))
    title = "Do all strategies learn the same?" if len(shown) > 1 else "Does it learn?"
    return ReportPanel(name="curves", title=title, short="Learning", views=tuple(views))


def _losses(entries: Sequence[Entry]) -> View:
    points = {entry.label: _points(entry.steps, "loss") for entry in entries}
    missing = {entry.label: _not_finite(entry) for entry in entries}
    words = _loss_words(entries)
    notes = [
        f"{label}: the loss is not a number in {count} of {len(entry.steps)} steps, from step {first} on; "
        "the curve has a gap."
        for entry in entries
        for label, (count, first) in [(entry.label, missing[entry.label])]
        if count
    ]
    many = [entry for entry in entries if len(entry.steps) > MOST_POINTS]
    if many:
        notes.append(f"Each point is the mean of up to {-(-max(len(e.steps) for e in many) // MOST_POINTS)} steps.")
    return View(
        label="loss of each step",
        words=(words,),
        charts=(_chart("optimizer step", "training loss", points),),
        header=("run", "steps", "first loss", "last loss", "steps without a finite loss"),
        rows=[_loss_row(entry, missing[entry.label][0]) for entry in entries],
        notes=tuple(notes),
    )


def _loss_words(entries: Sequence[Entry]) -> str:
    last = [(entry, values[-1]) for entry in entries if (values := [y for _, y in _points(entry.steps, "loss")])]
    if not last:
        return "No loss is a finite number: the training has diverged."
    if len(last) == 1:
        entry, value = last[0]
        first = _points(entry.steps, "loss")[0][1]
        return f"The loss went from {first:.4g} to {value:.4g} in {len(entry.steps):,} steps."
    values = [value for _, value in last]
    apart = (max(values) - min(values)) / (abs(sum(values)) / len(values) or 1.0)
    if apart < 1e-3:
        return (
            f"All end at the same loss, {values[0]:.4g}: the strategies are one training, computed in different ways."
        )
    return f"The last losses lie between {min(values):.4g} and {max(values):.4g}."


def _loss_row(entry: Entry, missing: int) -> list[str]:
    values = [y for _, y in _points(entry.steps, "loss")]
    ends = [f"{values[0]:.5g}", f"{values[-1]:.5g}"] if values else ["-", "-"]
    return [entry.label, f"{len(entry.steps):,}", *ends, str(missing)]


def _not_finite(entry: Entry) -> tuple[int, int]:
    """Return the number of steps whose loss is not finite, and the first of them."""
    steps = [int(number(step, "step") or 0) for step in entry.steps if number(step, "loss") is None]
    return len(steps), min(steps, default=0)


def _metric(name: str, entries: Sequence[Entry]) -> View:
    points = {
        entry.label: [
            (step, value)
            for line in entry.evaluations
            if (step := number(line, "step")) is not None and (value := number(line, "evaluation", name)) is not None
        ]
        for entry in entries
    }
    last = {label: values[-1][1] for label, values in points.items() if values}
    told = ", ".join(f"{label} {value:.4g}" for label, value in list(last.items())[:4])
    return View(
        label=f"{name} on held-out data",
        words=(f"{name} on held-out data, at the end: {told}." if told else f"{name} was never a finite number.",),
        charts=(_chart("optimizer step", name, points, dots=True),),
        header=("run", "evaluations", "last"),
        rows=[[label, str(len(values)), f"{values[-1][1]:.6g}" if values else "-"] for label, values in points.items()],
    )


def _speeds(entries: Sequence[Entry]) -> View:
    points = {entry.label: _points(entry.steps, "seconds") for entry in entries}
    rows = []
    for entry in entries:
        seconds = sorted(y for _, y in points[entry.label])
        cells = [format_seconds(seconds[len(seconds) // 2]), format_seconds(seconds[-1])] if seconds else ["-", "-"]
        rows.append([entry.label, str(len(seconds)), *cells])
    return View(
        label="seconds of each step",
        words=("How long each step took: a level line is a steady machine, a peak a step that something held up.",),
        charts=(_chart("optimizer step", "seconds of a step", points, unit="seconds"),),
        header=("run", "steps timed", "median", "longest"),
        rows=rows,
    )


def _points(lines: Sequence[Document], name: str) -> list[Point]:
    return [
        (step, value)
        for line in lines
        if (step := number(line, "step")) is not None and (value := number(line, name)) is not None
    ]


def _chart(
    x: str, y: str, points: dict[str, list[Point]], *, unit: str = "number", dots: bool = False
) -> dict[str, Any]:
    return {
        "kind": "lines",
        "x": x,
        "y": y,
        "unit": unit,
        "dots": dots,
        "series": [
            {"name": label, "color": series_colour(place), "dash": place // 10, "points": _fewer(values)}
            for place, (label, values) in enumerate(points.items())
        ],
    }


def _fewer(points: Sequence[Point]) -> list[list[float | None]]:
    """Return at most `MOST_POINTS` means of neighbours; a gap in the steps becomes a gap of the line."""
    size = -(-len(points) // MOST_POINTS) or 1
    found: list[list[float | None]] = []
    strides = [after - before for (before, _), (after, _) in pairwise(points)]
    usual = min(strides, default=1.0)
    for start in range(0, len(points), size):
        group = points[start : start + size]
        if start and size == 1 and points[start][0] - points[start - 1][0] > 1.5 * usual:
            found.append([points[start - 1][0] + usual, None])
        found.append([group[len(group) // 2][0], sum(value for _, value in group) / len(group)])
    return found
