"""Panels of `validate` and `calibrate`: predictions against published runs, and the measured machine."""

from __future__ import annotations

from typing import Any

from shardwise.reports.page.colours import series_colour
from shardwise.reports.page.html import tag
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, lookup, mapping, number, objects, text
from shardwise.units import format_bits, format_bytes, format_seconds, format_share


def accuracy_panel(document: Document) -> ReportPanel | None:
    """Return the panel of predictions against published runs; None if the report is not of `validate`."""
    found = mapping(document, "validation")
    if not found:
        return None
    groups = mapping(found, "groups")
    rows = [
        [
            name,
            f"{number(group, 'rows') or 0:.0f}",
            *(_share(group, key) for key in ("mean_error", "median_error", "p90_error")),
            "-" if number(group, "rank_correlation") is None else f"{number(group, 'rank_correlation') or 0:.2f}",
            _share(group, "memory_mean_error"),
        ]
        for name, group in groups.items()
        if isinstance(group, dict)
    ]
    charts = _scatter(found)
    view = View(
        words=(
            f"{number(found, 'rows') or 0:,.0f} published runs were predicted; half of the predictions are off by at "
            f"most {_share(found, 'median_error')}, nine in ten by at most {_share(found, 'p90_error')}.",
            "Each dot is a run: on the line, prediction and measurement agree; above it, the prediction is too slow.",
        ),
        charts=charts,
        header=("group", "runs", "mean error", "median", "nine in ten", "rank correlation", "memory, mean error"),
        rows=rows,
    )
    return ReportPanel(
        name="accuracy", title="How far off are the predictions?", short="Accuracy", views=(view,), wide=True
    )


def _scatter(found: Document) -> tuple[dict[str, Any], ...]:
    groups: dict[str, list[list[float]]] = {}
    for each in objects(found, "predictions"):
        measured, predicted = number(each, "measured_seconds"), number(each, "predicted_seconds")
        if measured and predicted:
            groups.setdefault(text(each, "group") or "runs", []).append([measured, predicted])
    if not groups:
        return ()
    series = [
        {"name": name, "color": series_colour(place), "points": points}
        for place, (name, points) in enumerate(groups.items())
    ]
    return (
        {"kind": "scatter", "x": "measured seconds of a step", "y": "predicted seconds of a step", "series": series},
    )


def calibration_panel(document: Document) -> ReportPanel | None:
    """Return the panel of the measured machine; None if the report is not of `calibrate`."""
    found = mapping(document, "calibration")
    if not found:
        return None
    rows = [[name.replace("_", " "), _shown(name, value)] for name, value in found.items() if _shown(name, value)]
    notes = [each for each in lookup(found, "notes") or [] if isinstance(each, str)]
    view = View(
        words=("Predictions on this machine rest on these measurements.",),
        header=("what", "measured"),
        rows=rows,
        picture=tag("ul", *(tag("li", note) for note in notes)) if notes else None,
    )
    return ReportPanel(
        name="calibration", title="What was measured on this machine?", short="Machine", views=(view,), wide=True
    )


def _shown(name: str, value: Any) -> str:
    """Format a value by the unit that its name states; empty if it is no single value."""
    if isinstance(value, bool) or value is None or isinstance(value, dict | list):
        return ""
    if isinstance(value, int | float):
        if name.endswith("bytes_per_second"):
            return format_bits(value)
        if name.endswith("bytes"):
            return format_bytes(value)
        return format_seconds(value) if name.endswith("seconds") else f"{value:,.4g}"
    return str(value)


def _share(document: Document, name: str) -> str:
    value = number(document, name)
    return "-" if value is None else format_share(value)
