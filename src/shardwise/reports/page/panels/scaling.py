"""Panel of the scaling curve: samples per second over devices, and where more of them stop paying."""

from __future__ import annotations

from typing import Any

from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, number, objects, text
from shardwise.units import format_rate, format_seconds, format_share

WORTH = 0.5
"""Least part of a first device's samples per second that an added device must bring, as in `planner.scaling`."""


def scaling_panel(document: Document) -> ReportPanel | None:
    """Return the panel; None for reports that are about no training."""
    if document.get("kind") in ("verify", "validate", "calibrate"):
        return None
    rows = objects(document, "scaling")
    title = "Would more devices help?"
    fitting = [row for row in rows if number(row, "samples_per_second")]
    if len(fitting) < 2:
        why = text(document, "scaling_reason") or "nothing was predicted for other numbers of devices"
        return ReportPanel(name="scaling", title=title, short="Scaling", missing=f"There is no scaling curve: {why}.")
    view = View(
        words=(_lead(fitting, number(document, "worth_workers")),),
        charts=(_chart(fitting, number(document, "worth_workers"), document),),
        header=("devices", "best strategy", "step", "samples/s", "speedup", "efficiency", "$ per million samples"),
        rows=[_row(row) for row in rows],
        notes=(
            "Predicted. The dashed line is what as many devices would do if none ever waited. More devices pay as long "
            f"as each added one brings at least {format_share(WORTH)} of what each of the first ones does.",
        ),
    )
    return ReportPanel(name="scaling", title=title, short="Scaling", views=(view,))


def _lead(rows: list[Document], worth: float | None) -> str:
    first, last = rows[0], rows[-1]
    ends = (
        f"{_devices(last)} do {format_rate(number(last, 'samples_per_second') or 0.0)} samples/s, "
        f"{(number(last, 'speedup') or 0.0):.2g} times what {_devices(first)} "
        f"{'does' if number(first, 'workers') == 1 else 'do'}"
    )
    if worth is None:
        return f"{ends}."
    most = number(last, "workers") or 0.0
    if worth >= most:
        return f"Up to {worth:,.0f} devices, the most that were looked at, each added one pays: {ends}."
    return f"More than {worth:,.0f} device{'s' if worth != 1 else ''} do not pay: {ends}."


def _devices(row: Document) -> str:
    count = number(row, "workers") or 0.0
    return f"{count:,.0f} device{'s' if count != 1 else ''}"


def _row(row: Document) -> list[str]:
    rate, seconds = number(row, "samples_per_second"), number(row, "step_seconds")
    if rate is None or seconds is None:
        return [f"{number(row, 'workers') or 0:,.0f}", "does not fit", *["-"] * 5]
    dollars, efficiency, speedup = (number(row, n) for n in ("dollars_per_million_samples", "efficiency", "speedup"))
    return [
        f"{number(row, 'workers') or 0:,.0f}",
        text(row, "strategy"),
        format_seconds(seconds),
        format_rate(rate),
        "-" if speedup is None else f"{speedup:.2f}",
        "-" if efficiency is None else format_share(efficiency),
        "-" if dollars is None else f"{dollars:.2f}",
    ]


def _chart(rows: list[Document], worth: float | None, document: Document) -> dict[str, Any]:
    base = rows[0]
    each = (number(base, "samples_per_second") or 0.0) / (number(base, "workers") or 1.0)
    predicted = [[number(row, "workers"), number(row, "samples_per_second")] for row in rows]
    ideal = [[number(row, "workers"), each * (number(row, "workers") or 0.0)] for row in rows]
    series: list[dict[str, Any]] = [
        {"name": "predicted", "color": "#0072B2", "points": predicted},
        {"name": "if nobody ever waited", "color": "#8C8C8C", "dash": 1, "points": ideal},
    ]
    measured = [
        [number(point, "workers"), number(point, "samples_per_second")] for point in objects(document, "measured_rates")
    ]
    if measured:
        series.append({"name": "measured", "color": "#D55E00", "points": measured, "line": False})
    marks = [{"x": worth, "name": f"pays up to {worth:,.0f}"}] if worth is not None else []
    return {
        "kind": "lines",
        "x": "devices",
        "y": "samples per second",
        "unit": "number",
        "log": True,
        "ticks": [number(row, "workers") for row in rows],
        "dots": True,
        "series": series,
        "marks": marks,
    }
