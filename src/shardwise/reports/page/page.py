"""Render a report: one HTML file that needs no network, from the document that `entry` describes."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from math import isfinite
from typing import Any

from shardwise.reports.page.entry import Entry, entries_of
from shardwise.reports.page.html import Markup, tag
from shardwise.reports.page.panel import ReportPanel, panel_html
from shardwise.reports.page.panels.accuracy import accuracy_panel, calibration_panel
from shardwise.reports.page.panels.curves import curves_panel
from shardwise.reports.page.panels.memory import memory_panel
from shardwise.reports.page.panels.model import model_panel
from shardwise.reports.page.panels.proof import proof_panel
from shardwise.reports.page.panels.ranks import ranks_panel
from shardwise.reports.page.panels.scaling import scaling_panel
from shardwise.reports.page.panels.setup import setup_panel
from shardwise.reports.page.panels.split import batch_of, split_panel
from shardwise.reports.page.panels.strategies import strategies_panel
from shardwise.reports.page.panels.timeline import pipeline_panel, timeline_panel
from shardwise.reports.page.panels.what_if import what_if_panel
from shardwise.reports.page.values import Document, lookup, text
from shardwise.reports.page.verdict import Verdict, main_entry, verdict

WORDS = (
    ("worker, rank", "one process with one device; ranks number them"),
    ("step", "one update of the model, from one batch of samples"),
    ("exposed communication", "time in which a worker waits for data because nothing is left to compute meanwhile"),
    ("bubble", "time in which a stage of a pipeline waits for another stage"),
    ("dp, fsdp", "data parallel: each worker has a part of the samples; with fsdp also only a slice of the model"),
    ("tp, pp", "model parallel: each layer is split (tp), or each worker has some of the layers (pp)"),
    ("regret", "how much slower the strategy that was chosen by prediction is than the one that was fastest"),
)
"""Words that the page uses, with their meaning."""


def render(document: Mapping[str, Any]) -> str:
    """Return the page of a report's document; see `entry` for its keys."""
    entries = entries_of(document)
    panels = _panels(document, entries)
    contents: list[Markup] = []
    charts: list[Mapping[str, Any]] = []
    for panel in panels:
        content, found = panel_html(panel, len(charts))
        contents.append(content)
        charts += found
    title = f"{text(document, 'title') or 'Report'} · Shardwise"
    body = [
        _header(document),
        tag(
            "main",
            _card(verdict(document, entries)),
            _contents(panels),
            *contents,
            _glossary(),
            id="main",
        ),
        tag("footer", text(document, "made")),
        tag("script", embedded({"charts": charts, "report": _light(document)}), type="application/json", id="data"),
    ]
    scripts = [_asset("echarts.min.js"), _asset("report.js")]
    policy = " ".join(f"'sha256-{_hash(script)}'" for script in scripts)
    head = [
        Markup('<meta charset="utf-8">'),
        tag("meta", name="viewport", content="width=device-width, initial-scale=1"),
        Markup(
            "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'; "
            f'img-src data: blob:; script-src {policy}">'
        ),
        tag("meta", name="color-scheme", content="light dark"),
        tag("title", title),
        Markup(f"<style>{_asset('report.css')}</style>"),
    ]
    page = [*body, *(Markup(f"<script>{script}</script>") for script in scripts)]
    return f'<!DOCTYPE html>\n<html lang="en">{tag("head", *head)}{tag("body", *page)}</html>\n'


def embedded(content: Any) -> Markup:
    """Return JSON that may stand in a script element: no `<`, and None for what is not finite."""
    try:
        words = json.dumps(content, allow_nan=False, separators=(",", ":"))
    except ValueError:  # it has infinities or nan
        words = json.dumps(_finite(content), allow_nan=False, separators=(",", ":"))
    return Markup(words.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029"))


def _panels(document: Document, entries: Sequence[Entry]) -> list[ReportPanel]:
    main = main_entry(document, entries)
    first = sorted(entries, key=lambda entry: entry is not main)  # the views of the verdict's entry come first
    found = (
        strategies_panel(document, entries),
        split_panel(entries, batch_of(document, entries)),
        timeline_panel(first),
        pipeline_panel(first),
        memory_panel(entries),
        ranks_panel(first),
        curves_panel(entries),
        proof_panel(document, entries),
        scaling_panel(document),
        what_if_panel(document),
        model_panel(first),
        accuracy_panel(document),
        calibration_panel(document),
        setup_panel(document, entries),
    )
    return [panel for panel in found if panel is not None]


def _header(document: Document) -> Markup:
    kinds = {
        "run": "a training run",
        "runs": "runs beside each other",
        "compare": "strategies compared",
        "simulate": "a prediction",
        "plan": "a plan",
        "verify": "a verification",
        "validate": "predictions against published runs",
        "calibrate": "a calibration",
    }
    return tag(
        "header",
        tag("a", "Skip to the report", href="#main", class_="skip"),
        tag("span", "shardwise", class_="brand"),
        tag("h1", text(document, "title") or "Report", tag("small", kinds.get(text(document, "kind"), ""))),
    )


def _card(found: Verdict) -> Markup:
    tiles = [
        tag("div", tag("dt", name), tag("dd", value), tag("dd", remark, class_="remark"))
        for name, value, remark in found.tiles
    ]
    parts = [
        tag("span", style=f"flex-grow:{share:.4f};background:{colour}", title=f"{name}: {share:.0%}")
        for name, colour, share in found.parts
    ]
    keys = [
        tag("span", tag("i", style=f"background:{colour}"), f"{name} {share:.0%}", class_="key")
        for name, colour, share in found.parts
    ]
    bar = [
        tag(
            "div",
            *parts,
            class_="bar",
            role="img",
            aria_label="One step: " + ", ".join(f"{n} {s:.0%}" for n, _, s in found.parts),
        ),
        tag("p", *keys, class_="keys"),
    ]
    changes = [tag("h3", "What would change it"), tag("ul", *(tag("li", each) for each in found.changes))]
    return tag(
        "section",
        tag("p", found.headline, class_="headline"),
        *(bar if found.parts else []),
        *([tag("p", found.binds, class_="binds")] if found.binds else []),
        *([tag("dl", *tiles, class_="tiles")] if tiles else []),
        *(changes if found.changes else []),
        class_="verdict",
        id="verdict",
        aria_label="Verdict",
    )


def _contents(panels: Sequence[ReportPanel]) -> Markup:
    return tag("nav", *(tag("a", panel.short, href=f"#{panel.name}") for panel in panels), aria_label="Panels")


def _glossary() -> Markup:
    words = [part for name, meaning in WORDS for part in (tag("dt", name), tag("dd", meaning))]
    return tag("details", tag("summary", "The words of this page"), tag("dl", *words), class_="words")


def _light(document: Document) -> dict[str, Any]:
    """Return the document without the timelines and steps, which the charts hold."""
    entries = [
        {key: value for key, value in each.items() if key not in ("timeline", "steps", "ranks", "prediction")}
        | {"prediction": {key: value for key, value in (lookup(each, "prediction") or {}).items() if key != "timeline"}}
        for each in lookup(document, "entries") or []
    ]
    return {key: value for key, value in document.items() if key not in ("entries", "what_if")} | {"entries": entries}


def _finite(value: Any) -> Any:
    """Return a copy of a JSON-able value with None for what is infinite or no number."""
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not isfinite(value) else value


@cache
def _asset(name: str) -> str:
    return (files("shardwise.reports.page") / "assets" / name).read_text(encoding="utf-8")


def _hash(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
