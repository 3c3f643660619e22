"""Panel in which a reader changes devices, bandwidth, batch and strategy and sees what the closed form predicts.

Its numbers were computed when the page was written; the page only looks them up, so that they are those of `simulate`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shardwise.reports.page.html import Markup, tag
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, as_number, lookup, mapping, number, objects, text, texts
from shardwise.units import format_bytes, format_rate, format_seconds

CONTROLS = (("devices", "devices"), ("bandwidth", "bandwidth of all links"), ("batch", "samples of a step"))
"""Sliders: key of their stops, and what they are called."""


def what_if_panel(document: Document) -> ReportPanel | None:
    """Return the panel; None for reports that are about no training."""
    if document.get("kind") in ("verify", "validate", "calibrate"):
        return None
    title, found = "What if …?", mapping(document, "what_if")
    cells = objects(found, "cells")
    if not cells:
        why = text(document, "what_if_reason") or "the folder has no what_if.json"
        return ReportPanel(name="what-if", title=title, short="What if", missing=f"There is nothing to try: {why}.")
    words = (
        "Move a slider: what would another number of devices, another network or another batch do?",
        "Every number is what shardwise simulate prints for this setting; the line at the end says how to repeat it.",
    )
    view = View(
        words=words,
        picture=_controls(found),
        charts=({"kind": "what-if", **_values(found, cells)},),
        header=("devices", "bandwidth", "batch", "best strategy", "step", "samples/s"),
        rows=_best_rows(found, cells),
        notes=tuple(texts(found, "notes")),
    )
    return ReportPanel(name="what-if", title=title, short="What if", views=(view,))


def _stops(found: Document, name: str) -> list[float]:
    stops = lookup(found, name)
    return [value for each in stops if (value := as_number(each)) is not None] if isinstance(stops, list) else []


def _controls(found: Document) -> Markup:
    rows = []
    for name, words in CONTROLS:
        stops = _stops(found, name)
        here = number(found, "here", name)
        place = stops.index(here) if here in stops else 0
        rows.append(
            tag(
                "label",
                tag("span", words),
                tag(
                    "input", type="range", min="0", max=str(len(stops) - 1), step="1", value=str(place), data_stop=name
                ),
                tag("output", "", data_shows=name),
            )
        )
    rows.append(
        tag(
            "label",
            tag("span", "strategy"),
            tag("select", tag("option", "the best one", value=""), data_stop="strategy"),
        )
    )
    tiles = [
        tag("div", tag("dt", words), tag("dd", "", data_result=name))
        for name, words in (
            ("strategy", "strategy"),
            ("step", "step"),
            ("rate", "samples/s"),
            ("efficiency", "efficiency"),
            ("memory", "memory of a device"),
            ("cost", "$ per million samples"),
        )
    ]
    return tag(
        "div",
        tag("div", *rows, class_="controls"),
        tag("dl", *tiles, class_="tiles", aria_live="polite"),
        tag("p", "", class_="note", data_result="binds"),
        tag("p", tag("span", "To repeat: "), tag("code", "", data_result="command"), class_="command"),
        class_="what-if",
    )


def _values(found: Document, cells: Sequence[Document]) -> dict[str, Any]:
    """Return the stops and the cells in columns, with each number as `simulate` prints it beside its exact value."""
    return {
        "devices": _stops(found, "devices"),
        "bandwidth": _stops(found, "bandwidth"),
        "batch": _stops(found, "batch"),
        "here": dict(mapping(found, "here")),
        "command": text(found, "command"),
        "clusters": dict(mapping(found, "clusters")),
        "batch_setting": text(found, "batch_setting"),
        "dollars_per_hour": dict(mapping(found, "dollars_per_hour")),
        "cells": [
            {
                "at": [number(cell, name) for name, _ in CONTROLS],
                "strategies": [_strategy(each) for each in objects(cell, "candidates")],
                "rejected": [[text(each, "strategy"), text(each, "reason")] for each in objects(cell, "rejected")],
            }
            for cell in cells
        ],
    }


def _strategy(each: Document) -> list[Any]:
    step, rate, memory = (number(each, n) or 0.0 for n in ("step_seconds", "samples_per_second", "memory_bytes"))
    waits = {
        "communication": number(each, "exposed_communication_seconds") or 0.0,
        "bubble": number(each, "bubble_seconds") or 0.0,
    }
    return [
        text(each, "strategy"),
        step,
        rate,
        memory,
        each.get("fits") is True,
        format_seconds(step),
        format_rate(rate),
        format_bytes(memory),
        waits["communication"] / step if step else 0.0,
        waits["bubble"] / step if step else 0.0,
    ]


def best_of(cell: Document) -> Document | None:
    """Return the fastest candidate of a cell that fits. Returns None if none does."""
    fitting = [each for each in objects(cell, "candidates") if each.get("fits") is True]
    return min(fitting, key=lambda each: number(each, "step_seconds") or 0.0, default=None)


def _best_rows(found: Document, cells: Sequence[Document]) -> list[list[str]]:
    rows = []
    for cell in cells:
        best = best_of(cell)
        where = [
            f"{number(cell, 'devices') or 0:,.0f}",
            f"{number(cell, 'bandwidth') or 0:g} times",
            f"{number(cell, 'batch') or 0:,.0f}",
        ]
        if best is None:
            rows.append([*where, "none fits", "-", "-"])
        else:
            seconds, rate = number(best, "step_seconds") or 0.0, number(best, "samples_per_second") or 0.0
            rows.append([*where, text(best, "strategy"), format_seconds(seconds), format_rate(rate)])
    return rows
