"""Panel of the model as it was cut: its segments and stages, what was split, and what stayed whole."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.reports.page.colours import series_colour
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.html import Markup, tag
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, lookup, number, objects, text
from shardwise.units import format_bytes, format_share

MOST_SEGMENTS = 240
"""Largest number of segments in the picture."""


def model_panel(entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel; None if no strategy is shown."""
    if not entries:
        return None
    views = tuple(view for entry in entries if (view := _view(entry)) is not None)
    why = entries[0].reason("model", "no prediction with the model's cut was recorded")
    missing = "" if views else f"How the model was cut is not known: {why}."
    return ReportPanel(name="model", title="How was the model cut?", short="Model", views=views, missing=missing)


def _view(entry: Entry) -> View | None:
    segments, shards, whole = (objects(entry.model, name) for name in ("segments", "shards", "whole"))
    if not segments and not shards and not whole:
        return None
    rows = [
        ["segment", text(each, "name"), _count(each, "parameters"), _bytes(each, "bytes"), f"stage {_stage(each)}"]
        for each in segments
    ]
    rows += [
        ["split", text(each, "parameter"), _shape(each), text(each, "axis"), _plain(each, "spec")] for each in shards
    ]
    rows += [["whole", text(each, "parameter"), "-", "-", text(each, "reason")] for each in whole]
    return View(
        label=entry.label,
        words=tuple(_words(entry, segments, shards, whole)),
        picture=_picture(segments) if segments else None,
        header=("what", "name", "parameters or shape", "bytes or axis", "where or why"),
        rows=rows,
    )


def _words(
    entry: Entry, segments: Sequence[Document], shards: Sequence[Document], whole: Sequence[Document]
) -> list[str]:
    stages = {_stage(each) for each in segments}
    total = sum(number(each, "parameters") or 0.0 for each in segments)
    words = []
    if segments:
        in_stages = f", divided into {len(stages)} stages" if len(stages) > 1 else ", all on every worker of a replica"
        words.append(f"{total:,.0f} parameters in {len(segments)} segments between places to cut{in_stages}.")
    share = number(entry.model, "sharded_parameter_share")
    if share is not None and (shards or share > 0):
        words.append(f"{format_share(share)} of the parameters are split among workers.")
    if whole:
        names = ", ".join(text(each, "parameter") for each in whole[:3])
        more = f" and {len(whole) - 3} more" if len(whole) > 3 else ""
        words.append(
            f"Whole on every worker: {names}{more}. First reason: {text(whole[0], 'reason') or 'not recorded'}."
        )
    return words


def _picture(segments: Sequence[Document]) -> Markup:
    """Return the segments from input to output, as wide as they have parameters, coloured by stage."""
    sizes = [number(each, "parameters") or 0.0 for each in segments[:MOST_SEGMENTS]]
    least = (sum(sizes) or 1.0) / 150
    boxes = []
    for each, size in zip(segments, sizes, strict=False):
        stage, name = _stage(each), text(each, "name")
        wide = max(size, least)
        title = f"{name}: {size:,.0f} parameters, {_bytes(each, 'bytes')}, stage {stage}"
        boxes.append(
            tag(
                "span",
                tag("span", name),
                class_="segment",
                style=f"flex-grow:{wide / least:.2f};background:{series_colour(stage)}",
                title=title,
            )
        )
    legend = [
        tag("span", tag("i", style=f"background:{series_colour(stage)}"), f"stage {stage}", class_="key")
        for stage in sorted({_stage(each) for each in segments})
    ]
    return tag(
        "div",
        tag(
            "div",
            tag("span", "input", class_="end"),
            *boxes,
            tag("span", "loss", class_="end"),
            class_="segments",
            role="img",
            aria_label=f"{len(segments)} segments",
        ),
        tag("p", *legend, class_="keys") if len(legend) > 1 else Markup(""),
    )


def _stage(segment: Document) -> int:
    return int(number(segment, "stage") or 0)


def _count(document: Document, name: str) -> str:
    value = number(document, name)
    return "-" if value is None else f"{value:,.0f}"


def _bytes(document: Document, name: str) -> str:
    value = number(document, name)
    return "-" if value is None else format_bytes(value)


def _shape(document: Document) -> str:
    shape = lookup(document, "shape")
    return " x ".join(str(each) for each in shape) if isinstance(shape, list) else _plain(document, "shape")


def _plain(document: Document, name: str) -> str:
    value = lookup(document, name)
    return "-" if value is None else str(value)[:80]
