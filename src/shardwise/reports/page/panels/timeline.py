"""Panel of one step as a timeline per rank, predicted above and measured beneath, and the table of a pipeline."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.reports.page.colours import KINDS, PARTS
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.html import Markup, tag
from shardwise.reports.page.intervals import (
    COMPUTE,
    WAITING,
    Interval,
    axis_of,
    by_rank,
    length,
    ranks_of,
    span,
    union,
    without,
)
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, number, text
from shardwise.units import format_seconds, format_share

MOST_EVENTS = 12_000
"""Largest number of operations drawn in one timeline."""

MOST_ROWS = 64
"""Largest number of ranks drawn in one timeline."""

LONGEST = 60
"""Longest name of an operation in the table, in characters."""

FORWARD, BACKWARD = "forward", ("backward", "backward of inputs")


def timeline_panel(entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel of timelines; None if no strategy is shown."""
    if not entries:
        return None
    views = tuple(view for entry in entries if (view := _view(entry)) is not None)
    reasons = {entry.reason("timeline", "") for entry in entries} - {""}
    missing = (
        ""
        if views
        else "No step was recorded operation by operation, and none was predicted so: "
        + ("; ".join(sorted(reasons)) or "the run's folder has no timeline.json and no timeline in prediction.json")
    )
    return ReportPanel(
        name="timeline",
        title="What does each worker do during one step?",
        short="Timeline",
        views=views,
        missing=f"{missing}." if missing else "",
    )


def _view(entry: Entry) -> View | None:
    predicted, measured = entry.predicted_rows, entry.measured_rows
    if not predicted and not measured:
        return None
    seconds = max(end - begin for begin, end in (span(predicted), span(measured)))
    charts = [_chart(rows, name, seconds) for name, rows in (("predicted", predicted), ("measured", measured)) if rows]
    notes = []
    drawn = len(ranks_of(predicted))
    if predicted and entry.workers and drawn < entry.workers:
        notes.append(
            f"Predicted workers that do the same at the same time are drawn once: {drawn} of {entry.workers:,}."
        )
    if not measured:
        said = entry.reason("measured_timeline", "the run's folder has no timeline.json")
        notes.append(f"No measured step to set beneath it: {said}." if entry.was_run else "Predicted; nothing was run.")
    if not predicted:
        notes.append(f"No predicted step to set above it: {entry.reason('predicted_timeline', 'none was recorded')}.")
    cut = text(entry.content, "prediction", "timeline_note")
    notes += [cut] if cut else []
    for name, rows in (("predicted", predicted), ("measured", measured)):
        if len(rows) > MOST_EVENTS or len(ranks_of(rows)) > MOST_ROWS:
            notes.append(
                f"Of the {name} step the picture shows the first {MOST_ROWS} of {len(ranks_of(rows))} ranks and at "
                f"most {MOST_EVENTS:,} of {len(rows):,} operations."
            )
    return View(
        label=entry.label,
        words=(
            _lead(predicted or measured, measured=not predicted),
            "Each row is a worker: above what it computes, below what it sends. Drag the bar below, or use the keys "
            "+, - and the arrows, to look closer.",
        ),
        charts=tuple(charts),
        header=("step", "rank", "computing", "communicating", "of it while computing", "idle"),
        rows=[row for name, rows in (("predicted", predicted), ("measured", measured)) for row in _rows(name, rows)],
        notes=tuple(notes),
    )


def _lead(rows: Sequence[Document], *, measured: bool) -> str:
    begin, end = span(rows)
    sums = [_sums(own) for own in by_rank(rows).values()]
    busy = sum(each[0] for each in sums) / len(sums)
    word = "In the step that was recorded" if measured else "In the predicted step"
    return (
        f"{word}, of {format_seconds(end - begin)}, a worker computes for {format_share(busy / (end - begin))} of the "
        "time, on average."
    )


def _sums(rows: Sequence[Document]) -> tuple[float, float, float]:
    """Return the seconds in which the rank of these rows computes, communicates, and does both."""
    streams: dict[str, list[Interval]] = {}
    for row in rows:
        begin, seconds = number(row, "start_seconds"), number(row, "seconds")
        if begin is not None and seconds is not None:
            stream = text(row, "stream")
            streams.setdefault(stream if stream in (COMPUTE, WAITING) else "", []).append((begin, begin + seconds))
    waits, other = streams.get(WAITING, []), union(streams.get("", []))
    compute = without(union(streams.get(COMPUTE, [])), union(waits))
    computing, communicating = length(compute), length(other)
    return computing, communicating, computing + communicating - length(union([*compute, *other]))


def _rows(name: str, rows: Sequence[Document]) -> list[list[str]]:
    begin, end = span(rows)
    found = []
    for rank, own in by_rank(rows).items():
        computing, communicating, both = _sums(own)
        idle = max(0.0, end - begin - computing - communicating + both)
        cells = (computing, communicating, both, idle)
        found.append([name, str(rank), *(format_seconds(value) for value in cells)])
    return found


def _chart(rows: Sequence[Document], name: str, seconds: float) -> dict[str, Any]:
    """Return the operations in columns: [rank, lane, kind, name, begin, length], times in whole nanoseconds."""
    begin, _ = span(rows)
    ranks = ranks_of(rows)[:MOST_ROWS]
    places = {rank: place for place, rank in enumerate(ranks)}
    kinds: dict[str, str] = {}
    numbers: dict[str, int] = {}
    names: dict[str, int] = {}
    events: list[list[int]] = []
    for row in rows:
        start, took, rank = number(row, "start_seconds"), number(row, "seconds"), row.get("rank")
        if rank not in places or start is None or took is None or len(events) == MOST_EVENTS:
            continue
        kind, colour = _kind(row)
        kinds.setdefault(kind, colour)
        numbers.setdefault(kind, len(numbers))
        label = names.setdefault(text(row, "name")[:LONGEST], len(names))
        lane = 0 if text(row, "stream") in (COMPUTE, WAITING) else 1
        events.append([places[rank], lane, numbers[kind], label, round((start - begin) * 1e9), round(took * 1e9)])
    processes = {row.get("rank"): text(row, "process") for row in rows}
    return {
        "kind": "timeline",
        "name": name,
        "span": round(seconds * 1e9),
        "ranks": [f"rank {rank}" for rank in ranks],
        "processes": [processes.get(rank, "") for rank in ranks],
        "kinds": [{"name": kind, "color": colour} for kind, colour in kinds.items()],
        "names": list(names),
        "events": events,
    }


def _kind(row: Document) -> tuple[str, str]:
    """Return the name and colour of an operation's kind: of computation its kind, of communication its axis."""
    stream, kind = text(row, "stream"), text(row, "kind")
    if stream in (COMPUTE, WAITING):
        return kind or COMPUTE, KINDS.get(kind, "#7FA6C9")
    axis = axis_of(stream)
    name = "communication" if axis in ("", "communication") else f"communication: {axis}"
    return name, PARTS.get(axis, PARTS["communication"])


def pipeline_panel(entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel of the pipelines' tables; None if no strategy has a pipeline."""
    piped = [entry for entry in entries if entry.parsed and entry.parsed.pp > 1]
    if not piped:
        return None
    views = []
    for entry in piped:
        for name, rows in (("predicted", entry.predicted_rows), ("measured", entry.measured_rows)):
            passes = [row for row in rows if number(row, "microbatch") is not None and text(row, "stream") == COMPUTE]
            if passes:
                views.append(_pipeline(entry, name, passes))
    missing = "" if views else "The order of the passes was neither recorded nor predicted for these strategies."
    return ReportPanel(
        name="pipeline", title="How full is the pipeline?", short="Pipeline", views=tuple(views), missing=missing
    )


WIDTH, HEIGHT, LEFT = 1000, 30, 92
"""Size of the table of a pipeline: its width, the height of a row, and the width of the names, in its own units."""


def _pipeline(entry: Entry, name: str, passes: Sequence[Document]) -> View:
    begin, end = span(passes)
    pipeline = ranks_of(passes)[: entry.parsed.pp if entry.parsed else None]
    rows, shapes = [], []
    shares = []
    for place, rank in enumerate(pipeline):
        own = [row for row in passes if row.get("rank") == rank]
        busy = length(
            union(
                (s, s + t)
                for row in own
                for s, t in [(number(row, "start_seconds") or 0.0, number(row, "seconds") or 0.0)]
            )
        )
        idle = max(0.0, end - begin - busy)
        shares.append(idle / (end - begin) if end > begin else 0.0)
        rows.append([f"rank {rank}", _order(own), format_seconds(busy), format_seconds(idle), format_share(shares[-1])])
        shapes += _pipeline_row(rank, place, own, begin, end)
    mean = sum(shares) / len(shares)
    return View(
        label=f"{entry.label}, {name}",
        words=(
            f"Between the first and the last pass, a worker of the pipeline waits {format_share(mean)} of the time, on "
            "average: the bubble, drawn grey.",
            "Each box is one microbatch passing through one stage: its number, light when it goes forward, dark when "
            "gradients come back.",
        ),
        picture=tag(
            "div",
            tag(
                "svg",
                *shapes,
                viewBox=f"0 0 {WIDTH} {HEIGHT * len(pipeline) + 4}",
                role="img",
                aria_label=f"Order of the passes of {entry.label}: {'; '.join(f'{row[0]} {row[1]}' for row in rows)}"[
                    :600
                ],
                class_="pipeline",
            ),
            class_="scroll",
            tabindex="0",
            role="region",
            aria_label="Table of the pipeline",
        ),
        header=("worker", "order", "busy", "waits", "share of waiting"),
        rows=rows,
    )


def _order(passes: Sequence[Document]) -> str:
    ordered = sorted(passes, key=lambda row: number(row, "start_seconds") or 0.0)
    words = list(dict.fromkeys(f"{_letter(row)}{number(row, 'microbatch'):.0f}" for row in ordered))
    return " ".join(words[:64]) + (" …" if len(words) > 64 else "")


def _letter(row: Document) -> str:
    kind = text(row, "kind")
    return "F" if kind == FORWARD else "B" if kind in BACKWARD else "W"


def _pipeline_row(rank: int, place: int, passes: Sequence[Document], begin: float, end: float) -> list[Markup]:
    """Return the boxes of one worker: its pieces of one pass are one box."""
    top, scale = place * HEIGHT + 2, (WIDTH - LEFT - 2) / ((end - begin) or 1.0)
    shapes = [
        tag("text", f"rank {rank}", x="0", y=str(top + 18), class_="axis"),
        tag("rect", x=str(LEFT), y=str(top), width=str(WIDTH - LEFT), height=str(HEIGHT - 4), class_="gap"),
    ]
    boxes: dict[tuple[str, float, float], list[float]] = {}
    for row in passes:
        start, took = number(row, "start_seconds") or 0.0, number(row, "seconds") or 0.0
        key = _letter(row), number(row, "microbatch") or 0.0, number(row, "stage") or 0.0
        box = boxes.setdefault(key, [start, start + took])
        box[0], box[1] = min(box[0], start), max(box[1], start + took)
    for (letter, microbatch, _), (start, stop) in boxes.items():
        x, width = LEFT + (start - begin) * scale, max(1.0, (stop - start) * scale - 1)
        shapes.append(
            tag("rect", x=f"{x:.1f}", y=str(top), width=f"{width:.1f}", height=str(HEIGHT - 4), class_=f"pass {letter}")
        )
        if width > 14:
            shapes.append(
                tag("text", f"{microbatch:.0f}", x=f"{x + width / 2:.1f}", y=str(top + 18), class_=f"number {letter}")
            )
    return shapes
