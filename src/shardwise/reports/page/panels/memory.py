"""Panel of the memory of each rank, by category, against the limit."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median
from typing import Any

from shardwise.reports.page.colours import MEMORY
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import amounts, number
from shardwise.units import format_bytes, format_share

MOST_RANKS = 16
"""Largest number of ranks with a bar each."""

Bar = tuple[str, dict[str, float]]


def memory_panel(entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel; None if no strategy is shown."""
    if not entries:
        return None
    views = tuple(view for entry in entries if (view := _view(entry)) is not None)
    if len(views) > 1:
        views = (_overview(entries), *views)
    missing = "" if views else "Memory was neither predicted nor measured."
    return ReportPanel(
        name="memory", title="Does it fit into memory, and what fills it?", short="Memory", views=views, missing=missing
    )


def _overview(entries: Sequence[Entry]) -> View:
    """Return the fullest worker of each strategy, beside each other."""
    bars: list[Bar] = []
    for entry in entries[:MOST_RANKS]:
        measured = max(_measured(entry), key=lambda bar: sum(bar[1].values()), default=None)
        if measured is not None:
            bars.append((f"{entry.label}  measured", measured[1]))
        predicted = {name: value for name, value in amounts(entry.candidate, "memory").items() if value > 0}
        if predicted:
            bars.append((f"{entry.label}  predicted", predicted))
    least, most = (choose(bars, key=lambda bar: sum(bar[1].values())) for choose in (min, max))
    return View(
        label="all strategies",
        words=(
            f"The fullest worker of each strategy: from {format_bytes(sum(least[1].values()))} ({least[0]}) to "
            f"{format_bytes(sum(most[1].values()))} ({most[0]}).",
        ),
        charts=(_chart(bars, []),),
        header=("strategy", "in all", *_names(bars)),
        rows=[_row(bar, _names(bars)) for bar in bars],
    )


def _view(entry: Entry) -> View | None:
    predicted = {name: value for name, value in amounts(entry.candidate, "memory").items() if value > 0}
    measured = _measured(entry)
    if not predicted and not measured:
        return None
    bars: list[Bar] = [("predicted, fullest", predicted)] if predicted else []
    shown = (
        sorted(measured, key=lambda bar: -sum(bar[1].values()))[:MOST_RANKS] if len(measured) > MOST_RANKS else measured
    )
    bars += shown
    usable, available = (
        number(entry.candidate, "memory_usable_bytes"),
        number(entry.candidate, "memory_available_bytes"),
    )
    limits = [{"name": "usable", "value": usable}] if usable else []
    if available and usable and available < usable:
        limits.insert(0, {"name": "limit of a plan", "value": available})
    largest = max(sum(parts.values()) for _, parts in bars)
    notes = []
    if len(measured) > MOST_RANKS:
        notes.append(f"The {MOST_RANKS} fullest of {len(measured):,} ranks are drawn; the table has all.")
    if usable and usable > 4 * largest:
        notes.append(f"A worker may use up to {format_bytes(usable)}, which lies outside of the picture.")
        limits = []
    if predicted and measured and not entry.memory_categories:
        notes.append("A run measures the sum on each rank; what fills it is predicted.")
    return View(
        label=entry.label,
        words=(_lead(entry, predicted, measured, available),),
        charts=(_chart(bars, limits),),
        header=("worker", "in all", *_names(bars)),
        rows=[_row(bar, _names(bars)) for bar in ([bars[0]] if predicted else []) + measured],
        notes=tuple(notes),
    )


def _measured(entry: Entry) -> list[Bar]:
    if entry.memory_categories:
        found = []
        for rank, (peak, parts) in enumerate(entry.memory_categories):
            rest = peak - sum(parts.values())
            found.append((f"rank {rank}", {**parts, "rest": parts.get("rest", 0.0) + rest} if rest > 0 else parts))
        return found
    return [(f"rank {rank}", {"in all": peak}) for rank, peak in enumerate(entry.memory_by_rank)]


def _lead(entry: Entry, predicted: dict[str, float], measured: list[Bar], available: float | None) -> str:
    peaks = [sum(parts.values()) for _, parts in measured]
    need = max(peaks, default=sum(predicted.values()))
    word = "needed" if peaks else "is predicted to need"
    told = f"The fullest worker {word} {format_bytes(need)}"
    if available:
        room = f"{format_share(need / available)} of the {format_bytes(available)} that it may fill"
        told += (
            f", {room}"
            if need <= available
            else f", more than the {format_bytes(available)} there are: it does not fit"
        )
    if predicted and peaks:
        whole = number(entry.summary, "predicted_memory_bytes") or sum(predicted.values())
        told += f"; predicted were {format_bytes(whole)} ({whole / need - 1:+.0%})"
    if len(peaks) > 1:
        told += f". Half of the ranks needed less than {format_bytes(median(peaks))}"
    return f"{told}."


def _names(bars: Sequence[Bar]) -> list[str]:
    known = [*MEMORY, "in all"]
    return [name for name in known if name != "in all" and any(name in parts for _, parts in bars)]


def _row(bar: Bar, names: Sequence[str]) -> list[str]:
    label, parts = bar
    return [label, format_bytes(sum(parts.values())), *(format_bytes(parts[n]) if n in parts else "-" for n in names)]


def _chart(bars: Sequence[Bar], limits: Sequence[dict[str, Any]]) -> dict[str, Any]:
    names = [name for name in [*MEMORY, "in all"] if any(name in parts for _, parts in bars)]
    return {
        "kind": "bars",
        "unit": "bytes",
        "axis": "memory of a worker",
        "categories": [label for label, _ in bars],
        "series": [
            {
                "name": "measured in all" if name == "in all" else name,
                "color": MEMORY.get(name, "#56B4E9"),
                "hatched": name in ("fragments", "context"),
                "values": [parts.get(name, 0.0) for _, parts in bars],
            }
            for name in names
        ],
        "limits": list(limits),
        "group": 1,
    }
