"""Panel of the strategies side by side: predicted against measured, in parts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.reports.page.colours import HATCHED, PART_NAMES, PARTS
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, as_number, lookup, number, objects, text
from shardwise.units import format_bytes, format_rate, format_seconds, format_share

UNKNOWN = "-"
SEEN = 0.002
"""Share of the longest step from which on a part is wide enough to be seen."""

MOST_SHOWN = 12
"""Largest number of strategies in the picture."""


def strategies_panel(document: Document, entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel; None if the report is about no strategy."""
    if not entries and not objects(document, "rejected"):
        return None
    several = len(entries) > 1
    title = "Which strategy is faster, and where does the time go?" if several else "Where does the time of a step go?"
    if not any(entry.predicted_seconds or entry.measured_seconds for entry in entries):
        why = next((entry.failure for entry in entries if entry.failure), "")
        said = f": {why}" if why else ": the run has no complete step yet, and nothing was predicted"
        return ReportPanel(
            name="strategies", title=title, short="Time", missing=f"No step was measured or predicted{said}."
        )
    chart = _chart(entries[:MOST_SHOWN])
    view = View(
        words=(_lead(document, entries), *_regret(document), *_pace(document)),
        charts=(chart,),
        header=HEADER,
        rows=[_row(entry) for entry in entries] + _rejected(document),
        notes=tuple(_notes(entries)),
    )
    return ReportPanel(name="strategies", title=title, short="Time", views=(view,), wide=several)


HEADER = (
    "strategy",
    "step, measured",
    "spread",
    "step, predicted",
    "prediction off",
    "samples/s",
    "memory of a worker",
    "exposed communication",
    "first step",
)


def _row(entry: Entry) -> list[str]:
    measured, predicted, spread = entry.measured_seconds, entry.predicted_seconds, entry.spread
    rate = entry.samples_per_second if entry.was_run else number(entry.candidate, "samples_per_second")
    memory = max(entry.memory_by_rank, default=None) or number(entry.candidate, "memory_bytes")
    off = predicted / measured - 1 if predicted and measured else None
    exposed = number(entry.summary, "communication_share")
    if exposed is None and predicted:
        exposed = (number(entry.candidate, "exposed_communication_seconds") or 0.0) / predicted
    return [
        entry.label,
        _failed(entry) or _seconds(measured),
        f"{format_seconds(spread[0])} to {format_seconds(spread[1])}" if spread else UNKNOWN,
        _seconds(predicted),
        UNKNOWN if off is None else f"{off:+.0%}",
        UNKNOWN if rate is None else format_rate(rate),
        UNKNOWN if memory is None else format_bytes(memory),
        UNKNOWN if exposed is None else format_share(exposed),
        _proof(entry),
    ]


def _failed(entry: Entry) -> str:
    return f"failed: {entry.failure}" if entry.failure else ""


def _rejected(document: Document) -> list[list[str]]:
    return [
        [text(each, "strategy"), f"cannot be: {text(each, 'reason')}", *[UNKNOWN] * (len(HEADER) - 2)]
        for each in objects(document, "rejected")
        if text(each, "kind") in ("", "model", "memory")
    ]


def _proof(entry: Entry) -> str:
    if not entry.first_step:
        return UNKNOWN
    if entry.first_step.get("proved") is True:
        return "equals one process"
    return f"not proved: {text(entry.first_step, 'reason')}"


def _chart(entries: Sequence[Entry]) -> dict[str, Any]:
    """Return stacked bars: of each strategy the measured step and the predicted one beneath."""
    bars = []
    for entry in entries:
        if entry.measured_seconds is not None:
            parts = entry.measured_parts or {"whole": entry.measured_seconds}
            bars.append((f"{entry.label}  measured", parts, entry.spread))
        if entry.predicted_seconds is not None:
            parts = entry.predicted_parts or {"whole": entry.predicted_seconds}
            bars.append((f"{entry.label}  predicted", parts, _range(entry)))
    longest = max(sum(parts.values()) for _, parts, _ in bars)
    names = [name for name in PARTS if any(parts.get(name, 0.0) >= SEEN * longest for _, parts, _ in bars)]
    return {
        "kind": "bars",
        "unit": "seconds",
        "axis": "seconds of a step",
        "categories": [label for label, _, _ in bars],
        "series": [
            {
                "name": PART_NAMES[name],
                "color": PARTS[name],
                "hatched": name in HATCHED,
                "values": [parts.get(name, 0.0) for _, parts, _ in bars],
            }
            for name in names
        ],
        "ranges": [[number, *found] for number, (_, _, found) in enumerate(bars) if found],
        "group": 2 if all(e.measured_seconds and e.predicted_seconds for e in entries) else 1,
    }


def _range(entry: Entry) -> tuple[float, float] | None:
    low, high = number(entry.candidate, "low_seconds"), number(entry.candidate, "high_seconds")
    return None if low is None or high is None else (low, high)


def _lead(document: Document, entries: Sequence[Entry]) -> str:
    measured = [entry for entry in entries if entry.measured_seconds]
    if len(measured) > 1:
        ordered = sorted(measured, key=lambda entry: entry.measured_seconds or 0.0)
        first, last = ordered[0], ordered[-1]
        times = (last.measured_seconds or 0.0) / (first.measured_seconds or 1.0)
        near = [entry.label for entry in ordered[1:] if _is_equal(document, first, entry)]
        equal = (
            f" Within the spread of the measurements {', '.join(near)} cannot be told apart from it." if near else ""
        )
        return (
            f"{first.label} was fastest: {format_seconds(first.measured_seconds or 0.0)} a step, {last.label} took "
            f"{times:.2g} times as long.{equal}"
        )
    if measured:
        entry = measured[0]
        seconds, predicted = entry.measured_seconds or 0.0, entry.predicted_seconds
        told = f"A step took {format_seconds(seconds)}"
        if predicted is None:
            return f"{told}; nothing was predicted: {entry.reason('prediction', 'no reason was recorded')}."
        return f"{told}; predicted before the run: {format_seconds(predicted)} ({predicted / seconds - 1:+.0%})."
    predicted_ones = sorted((e for e in entries if e.predicted_seconds), key=lambda e: e.predicted_seconds or 0.0)
    first = predicted_ones[0]
    best = next((entry for entry in entries if entry.strategy == text(document, "best")), first)
    more = "" if len(predicted_ones) == 1 else f", of {len(predicted_ones)} strategies shown"
    return f"{best.label} is predicted to take {format_seconds(best.predicted_seconds or 0.0)} a step{more}."


def _is_equal(document: Document, first: Entry, other: Entry) -> bool:
    """Return whether an entry equals the fastest within the spread: as the comparison says, else by the spreads."""
    equal = lookup(document, "comparison", "equal")
    if isinstance(equal, list):
        return other.label in equal
    ours, theirs = first.spread, other.spread
    return ours is not None and theirs is not None and theirs[0] <= ours[1]


def _regret(document: Document) -> list[str]:
    comparison = document.get("comparison")
    chosen, regret = text(comparison, "chosen"), number(comparison, "regret")
    if not chosen or regret is None:
        return []
    if regret <= 0:
        return [f"Before anything ran, {chosen} was predicted to be the fastest, and it was: nothing is regretted."]
    return [
        f"Before anything ran, {chosen} was predicted to be the fastest. Regret: it was {format_share(regret)} slower "
        "than the strategy that turned out fastest."
    ]


def _pace(document: Document) -> list[str]:
    pace = number(document.get("comparison"), "pace")
    if pace is None:
        return []
    return [
        f"A reference training, which took turns with the others, took {pace:.2f} times as long as while this machine "
        "was measured. Predictions are shown as they were made before that."
    ]


def _notes(entries: Sequence[Entry]) -> list[str]:
    notes = ["Thin lines: the middle half of the measured steps, or the range that nine in ten predictions keep."]
    if len(entries) > MOST_SHOWN:
        notes.append(f"The picture shows {MOST_SHOWN} of {len(entries)} strategies, the table all.")
    if any(entry.measured_rows for entry in entries):
        notes.append("How a measured step is divided was seen in one profiled step, averaged over the ranks.")
    elif any(entry.measured_parts for entry in entries):
        notes.append(
            "Measured steps are divided into computing (with the optimizer) and waiting: no step was recorded in "
            "detail."
        )
    return notes


def _seconds(value: Any) -> str:
    found = as_number(value)
    return UNKNOWN if found is None else format_seconds(found)
