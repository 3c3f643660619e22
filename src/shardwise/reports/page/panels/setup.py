"""Panel of the cluster, the versions, how to repeat what is shown, and the data to download."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.reports.page.entry import Entry
from shardwise.reports.page.html import Markup, tag
from shardwise.reports.page.panel import ReportPanel, View
from shardwise.reports.page.values import Document, lookup, mapping, number, objects, text, texts
from shardwise.units import format_bits, format_bytes, format_seconds


def setup_panel(document: Document, entries: Sequence[Entry]) -> ReportPanel:
    """Return the panel."""
    rows = [*_cluster(mapping(document, "cluster")), *_facts(document), *_entry_facts(entries)]
    commands = texts(document, "commands")
    picture = tag(
        "div",
        *([tag("h3", "To repeat it"), tag("pre", tag("code", "\n".join(commands)), tabindex="0")] if commands else []),
        tag(
            "p",
            tag(
                "button",
                "Download the data of this page (JSON)",
                type="button",
                class_="download",
                data_file="report.json",
            ),
            " ",
            tag("span", "Each table has a button to download it as CSV.", class_="note"),
        ),
        *_notes(document),
    )
    view = View(picture=picture, header=("what", "value", "from"), rows=rows)
    return ReportPanel(
        name="setup",
        title="On what, with which versions, and how to repeat it",
        short="Set-up",
        views=(view,),
        wide=True,
    )


def _notes(document: Document) -> list[Markup]:
    notes = list(dict.fromkeys(texts(document, "notes")))
    return [tag("h3", "Notes"), tag("ul", *(tag("li", note) for note in notes))] if notes else []


def _cluster(cluster: Document) -> list[list[str]]:
    rows = []
    if cluster:
        devices = number(cluster, "devices")
        count = "" if devices is None else f", {devices:,.0f} devices"
        rows.append(["cluster", f"{text(cluster, 'name')}{count}", ""])
        device = text(cluster, "device")
        rows += [["device", device, ""]] if device else []
        usable = number(cluster, "memory_usable_bytes") or number(cluster, "usable_memory_bytes")
        rows += [["usable memory of a device", format_bytes(usable), ""]] if usable else []
    for link in objects(cluster, "links"):
        speed, latency = number(link, "bytes_per_second"), number(link, "latency_seconds")
        told = [format_bits(speed)] if speed else []
        told += [f"latency {format_seconds(latency)}"] if latency is not None else []
        spans = f" among {number(link, 'devices') or 0:,.0f} devices"
        rows.append([f"link {text(link, 'name')}{spans}", ", ".join(told), text(link, "origins", "bandwidth")])
    return rows


def _facts(document: Document) -> list[list[str]]:
    facts = lookup(document, "facts")
    return [[str(name), str(value), ""] for name, value in facts.items()] if isinstance(facts, Mapping) else []


def _entry_facts(entries: Sequence[Entry]) -> list[list[str]]:
    rows: list[list[str]] = []
    origins: dict[str, list[str]] = {}
    for entry in entries:
        if text(entry.content, "folder"):
            rows.append([f"run {entry.label}", text(entry.content, "folder"), text(entry.request, "created")])
        for name, origin in mapping(entry.candidate, "origins").items():
            known = origins.setdefault(str(origin), [])
            known += [name] if name not in known else []
    rows += [["numbers that are " + origin, ", ".join(names), ""] for origin, names in origins.items()]
    return rows
