"""Panel that shows what each worker holds under a strategy: which part of the data, and which part of the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.reports.page.entry import Entry, axes_of
from shardwise.reports.page.html import Markup, tag
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, number
from shardwise.strategy import Strategy
from shardwise.units import format_bytes, format_seconds, format_share

MOST_DRAWN = 8
"""Largest number of workers in one picture."""

MOST_STRATEGIES = 8

BOX, GAP, TALL = 46, 12, 78
"""Width of a worker, the room between two, and the height of its model, in the units of the picture."""

WORDS = {
    "dp": "every worker has the whole model and a part of the data; gradients are summed after each step",
    "fsdp": "every worker has a part of the data and keeps a slice of each layer, gathered when it is needed",
    "tp": "every layer is split: the workers compute each sample together and exchange results in each layer",
    "pp": "the layers are split into stages: samples move from worker to worker, in microbatches",
}
"""Words on each axis."""


@dataclass(frozen=True, slots=True)
class WorkerShare:
    """WorkerShare of a worker: its replica, its share of the data and its part of the model, each counted from 0."""

    rank: int
    replica: int
    stage: int
    slice: int


def split_panel(entries: Sequence[Entry], batch: float | None) -> ReportPanel | None:
    """Return the panel; None if no strategy is shown.

    Args:
        entries: the strategies.
        batch: samples of a step over all workers; None if that is not known.
    """
    known = [(entry, parsed) for entry in entries if (parsed := entry.parsed) is not None]
    if not known:
        return None
    cards = [_card(entry, strategy, batch) for entry, strategy in known[:MOST_STRATEGIES]]
    view = View(
        words=("Blue is the part of the model that a worker keeps, orange the part of the data that it sees.",),
        picture=tag("div", *cards, class_="cards"),
        header=(
            "strategy",
            "workers",
            "samples of a worker",
            "of the model",
            "parameters, gradients, optimizer",
            "exposed communication",
            "bubble",
        ),
        rows=[_row(entry, strategy, batch) for entry, strategy in known],
    )
    return ReportPanel(
        name="split", title="Data or model: what does each worker hold?", short="Data or model", views=(view,)
    )


def _share(strategy: Strategy) -> float:
    """Return the part of the model that a worker keeps."""
    kept = strategy.fsdp if strategy.fsdp > 1 and strategy.zero == 3 else 1
    return 1.0 / (strategy.tp * strategy.pp * kept)


def _samples(strategy: Strategy, batch: float | None) -> float | None:
    return None if batch is None else batch / strategy.replicas


def _kept_bytes(entry: Entry) -> float | None:
    found = [number(entry.candidate, "memory", name) for name in ("parameters", "gradients", "optimizer")]
    known = [value for value in found if value is not None]
    return sum(known) if known else None


def _row(entry: Entry, strategy: Strategy, batch: float | None) -> list[str]:
    samples, kept = _samples(strategy, batch), _kept_bytes(entry)
    exposed, bubble = (
        number(entry.candidate, "exposed_communication_seconds"),
        number(entry.candidate, "bubble_seconds"),
    )
    return [
        entry.label,
        str(strategy.workers),
        "-" if samples is None else f"{samples:g} of {batch:g}",
        format_share(_share(strategy)),
        "-" if kept is None else format_bytes(kept),
        "-" if exposed is None else format_seconds(exposed),
        "-" if bubble is None else format_seconds(bubble),
    ]


def _card(entry: Entry, strategy: Strategy, batch: float | None) -> Markup:
    samples, kept = _samples(strategy, batch), _kept_bytes(entry)
    exposed, bubble = (
        number(entry.candidate, "exposed_communication_seconds"),
        number(entry.candidate, "bubble_seconds"),
    )
    lines = [
        f"{format_share(_share(strategy))} of the model on each worker"
        + ("" if kept is None else f", {format_bytes(kept)} with gradients and optimizer")
    ]
    if samples is not None:
        lines.append(f"{samples:g} of {batch:g} samples a step on each")
    if exposed is not None:
        waits = (
            f"{format_seconds(exposed)} of communication that nothing hides"
            if exposed > 0
            else "no exposed communication"
        )
        lines.append(waits + (f", {format_seconds(bubble)} of bubble" if bubble else ""))
    axes = [WORDS[axis] for axis in axes_of(strategy)] or ["one worker does everything"]
    return tag(
        "figure",
        _picture(strategy),
        tag(
            "figcaption",
            tag("strong", entry.label),
            tag("span", "; ".join(axes) + "."),
            tag("ul", *(tag("li", line) for line in lines)),
        ),
    )


def _places(strategy: Strategy) -> list[WorkerShare]:
    """Return the places of the workers that are drawn, those of the first replica first."""
    found = []
    for replica in range(strategy.replicas):
        for stage in range(strategy.pp):
            for slice_ in range(strategy.tp):
                row, column = divmod(replica, strategy.fsdp)
                rank = strategy.rank(dp=row, fsdp=column, pp=stage, tp=slice_)
                found.append(WorkerShare(rank, replica, stage, slice_))
                if len(found) == MOST_DRAWN:
                    return found
    return found


def _picture(strategy: Strategy) -> Markup:
    places = _places(strategy)
    rest = strategy.workers - len(places)
    width = len(places) * (BOX + GAP) + (84 if rest else 0)
    shapes = [
        shape for number_, place in enumerate(places) for shape in _worker(strategy, place, number_ * (BOX + GAP))
    ]
    if rest:
        shapes.append(tag("text", f"+ {rest:,} more", x=str(len(places) * (BOX + GAP) + 4), y="70", class_="axis"))
    said = f"{len(places)} of {strategy.workers} workers: each keeps {format_share(_share(strategy))} of the model"
    return tag(
        "svg", *shapes, viewBox=f"-2 0 {width} 132", width=str(width), role="img", aria_label=said, class_="split"
    )


def _worker(strategy: Strategy, place: WorkerShare, x: int) -> list[Markup]:
    """Return the shapes of one worker: its part of the data above its part of the model."""
    each, high = BOX / strategy.replicas, TALL / strategy.pp
    wide = BOX / strategy.tp
    kept = wide / strategy.fsdp if strategy.fsdp > 1 and strategy.zero == 3 else wide
    left = x + place.slice * wide + (place.replica % strategy.fsdp) * kept * (strategy.zero == 3)
    top = 30 + place.stage * high
    shapes = [
        tag("rect", x=_n(x), y="4", width=_n(BOX), height="16", class_="hollow"),
        tag("rect", x=_n(x + place.replica * each), y="4", width=_n(max(1.5, each)), height="16", class_="data"),
        tag("rect", x=_n(x), y="30", width=_n(BOX), height=_n(TALL), class_="hollow"),
    ]
    if kept < wide:  # gathered when it is needed
        shapes.append(tag("rect", x=_n(x), y=_n(top), width=_n(wide), height=_n(high), class_="gathered"))
    shapes.append(tag("rect", x=_n(left), y=_n(top), width=_n(max(1.5, kept)), height=_n(high), class_="model"))
    shapes += [
        tag("line", x1=_n(x), x2=_n(x + BOX), y1=_n(30 + TALL * n / 6), y2=_n(30 + TALL * n / 6), class_="layer")
        for n in range(1, 6)
    ]
    shapes.append(tag("text", f"rank {place.rank}", x=_n(x + BOX / 2), y="124", class_="axis middle"))
    return shapes


def _n(value: float) -> str:
    return f"{value:.1f}"


def batch_of(document: Document, entries: Sequence[Entry]) -> float | None:
    """Return the samples of a step over all workers: as stated, else of the last step. Returns None if unknown."""
    stated = number(document, "batch_size")
    if stated is not None:
        return stated
    for entry in entries:
        sizes = [size for step in entry.steps if (size := number(step, "samples"))]
        if sizes:
            return max(sizes)
        rate, seconds = number(entry.candidate, "samples_per_second"), number(entry.candidate, "step_seconds")
        if rate and seconds:
            return round(rate * seconds)
    return None
