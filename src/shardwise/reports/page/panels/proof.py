"""Panels of proofs: the first step of each run, and the whole trainings that `verify` compares."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.reports.page.entry import Entry
from shardwise.reports.page.html import tag
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, number, objects, text
from shardwise.units import format_share

TITLE = "Is it the same training as on one worker?"


def proof_panel(document: Document, entries: Sequence[Entry]) -> ReportPanel | None:
    """Return the panel; None if nothing was run."""
    verified = objects(document.get("verification"), "results")
    if verified:
        return ReportPanel(name="proof", title=TITLE, short="Proof", views=(_verified(document, verified),), wide=True)
    ran = [entry for entry in entries if entry.was_run]
    if not ran:
        return None
    shown = [entry for entry in ran if entry.first_step]
    if not shown:
        why = "the run has not written its summary, which tells of it" if not ran[0].ended else "it was not asked for"
        return ReportPanel(name="proof", title=TITLE, short="Proof", missing=f"The first step was not compared: {why}.")
    proved = [entry for entry in shown if entry.first_step.get("proved") is True]
    lead = (
        "The first step of each run was computed on one process too: loss and gradients are equal, up to rounding."
        if len(proved) == len(shown)
        else f"Of {len(shown)} runs {len(proved)} were proved equal to one process in their first step."
    )
    rows = [
        [
            entry.label,
            "equal" if entry.first_step.get("proved") is True else f"not proved: {text(entry.first_step, 'reason')}",
            _error(entry.first_step, "loss_error"),
            _error(entry.first_step, "gradient_error"),
        ]
        for entry in shown
    ]
    view = View(words=(lead,), header=("run", "first step", "difference of the loss", "of the gradients"), rows=rows)
    return ReportPanel(name="proof", title=TITLE, short="Proof", views=(view,), wide=True)


def _verified(document: Document, results: Sequence[Document]) -> View:
    failed = [text(each, "strategy") for each in results if each.get("passed") is not True]
    lead = (
        f"{', '.join(failed)}: not the same training as on one worker."
        if failed
        else f"Yes: {_all(len(results))} compute what one worker computes, up to rounding."
    )
    rows, marks = [], []
    for each in results:
        worst = max(
            (number(each, name) or 0.0 for name in ("loss_error", "gradient_error", "parameter_error")), default=0.0
        )
        tolerance = number(each, "tolerance")
        share = number(each, "sharded_parameter_share")
        rows.append(
            [
                text(each, "strategy"),
                "equal" if each.get("passed") is True else "DIFFERENT",
                f"{number(each, 'steps') or 0:.0f}",
                *(_error(each, name) for name in ("loss_error", "gradient_error", "parameter_error", "tolerance")),
                "-" if share is None else format_share(share),
            ]
        )
        marks.append(
            f"{text(each, 'strategy')}: largest difference {worst:.1e}"
            + ("" if tolerance is None else f", allowed {tolerance:.1e}")
        )
    header = ("strategy", "result", "steps", "loss", "gradients", "parameters", "allowed", "parameters split")
    return View(words=(lead,), picture=tag("ul", *(tag("li", mark) for mark in marks)), header=header, rows=rows)


def _all(count: int) -> str:
    return "the strategy does" if count == 1 else f"all {count} strategies"


def _error(document: Document, name: str) -> str:
    value = number(document, name)
    return "-" if value is None else f"{value:.1e}"
