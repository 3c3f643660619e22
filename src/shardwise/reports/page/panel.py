"""Panels of the report: a question, the answer in a sentence, a picture, and the same numbers as a table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.reports.page.html import Markup, table, tag

MOST_ROWS = 300
"""Largest number of rows of a table in the page."""


@dataclass(frozen=True, slots=True, kw_only=True)
class View:
    """One picture with its words and numbers.

    Attributes:
        label: name of the view, shown where a panel has several.
        words: sentences above the picture; the first is also read out in its place.
        charts: pictures that report.js draws: `kind` and its values.
        picture: picture that needs no script.
        header: names of the columns of the table.
        rows: rows of the table; a column in which all of them have `-` is not shown.
        notes: sentences below the picture.
    """

    label: str = ""
    words: tuple[str, ...] = ()
    charts: tuple[Mapping[str, Any], ...] = ()
    picture: Markup | None = None
    header: tuple[str, ...] = ()
    rows: Sequence[Sequence[str]] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ReportPanel:
    """One panel of the report.

    Attributes:
        name: identifier in the page.
        title: heading, a question.
        short: heading in the list of contents.
        views: what the panel shows; the reader chooses one where there are several.
        missing: sentence that says what cannot be shown, and why.
        wide: whether the table is shown without being opened.
    """

    name: str
    title: str
    short: str
    views: tuple[View, ...] = ()
    missing: str = ""
    wide: bool = False


def panel_html(panel: ReportPanel, first_chart: int) -> tuple[Markup, list[Mapping[str, Any]]]:
    """Return a panel as HTML, and its charts, which the page numbers from `first_chart` on."""
    charts: list[Mapping[str, Any]] = []
    views = []
    for number, view in enumerate(panel.views):
        views.append(_view_html(panel, view, number, first_chart + len(charts)))
        charts += view.charts
    missing = [tag("p", panel.missing, class_="missing")] if panel.missing else []
    several = len(panel.views) > 1
    chooser = [_chooser(panel)] if several else []
    heading = tag("h2", panel.title, id=f"{panel.name}-title")
    content = tag(
        "section",
        heading,
        *chooser,
        *views,
        *missing,
        id=panel.name,
        class_="panel",
        aria_labelledby=f"{panel.name}-title",
    )
    return content, charts


def _chooser(panel: ReportPanel) -> Markup:
    options = [tag("option", view.label, value=str(number)) for number, view in enumerate(panel.views)]
    return tag("label", "Show ", tag("select", *options, class_="choose", data_panel=panel.name), class_="chooser")


def _view_html(panel: ReportPanel, view: View, number: int, first_chart: int) -> Markup:
    words = [tag("p", sentence, class_="lead" if place == 0 else None) for place, sentence in enumerate(view.words)]
    label = view.words[0] if view.words else panel.title
    charts = [
        tag("div", class_="chart", data_chart=str(first_chart + place), role="img", tabindex="0", aria_label=label)
        for place in range(len(view.charts))
    ]
    notes = [tag("p", note, class_="note") for note in view.notes]
    heading = [tag("h3", view.label, class_="view-title")] if len(panel.views) > 1 else []
    return tag(
        "div",
        *heading,
        *words,
        *charts,
        *([view.picture] if view.picture is not None else []),
        *notes,
        *_table(panel, view),
        class_="view",
        id=f"{panel.name}-{number}",
    )


def _table(panel: ReportPanel, view: View) -> list[Markup]:
    """Return the table of a view, folded unless the panel is wide; empty if the view has none."""
    if not view.rows:
        return []
    caption = f"{panel.title} {view.label}".strip()
    known = [place for place in range(len(view.header)) if place == 0 or any(row[place] != "-" for row in view.rows)]
    header, *rows = ([row[place] for place in known] for row in (view.header, *view.rows[:MOST_ROWS]))
    shown = [table(header, rows, caption)]
    if len(view.rows) > MOST_ROWS:
        shown.append(
            tag(
                "p",
                f"The first {MOST_ROWS} of {len(view.rows):,} rows; the data below has what is drawn.",
                class_="note",
            )
        )
    return shown if panel.wide else [tag("details", tag("summary", "Numbers as a table"), *shown)]
