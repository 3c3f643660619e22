"""Text of a plan."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.reports.prediction import dry_run_rows, prediction_rows
from shardwise.reports.text import launch_rows, table, trained_by
from shardwise.units import format_bytes, format_rate, format_seconds, format_share

SHOWN = 8
"""Number of candidates in the table."""

KINDS = {
    "model": "cannot be for this model",
    "memory": "do not fit",
    "slower": "are slower",
}
"""Reasons for which strategies were rejected, in words."""


def plan_summary(document: Mapping[str, Any]) -> str:
    """Format the explanation, the best candidates, the scaling, and what happened to the other strategies."""
    where = f"{_devices(document['workers'])} of {document['cluster']}"
    lines = [
        f"{document['workload']} on {where}, in {document['precision']}{_by(document)}: {document['best']}",
        "",
        document["explanation"],
        *(f"note: {note}" for note in document["notes"]),
        "",
        *prediction_rows(document["candidates"][:SHOWN]),
        *dry_run_rows(document["candidates"][:SHOWN]),
        "",
        _rejected(document),
        *_scaling(document),
        *_pareto(document),
        *launch_rows(document),
    ]
    if "out" in document:
        lines += ["", f"wrote {document['out']}: run it with  shardwise train WORKLOAD --strategy {document['out']}"]
    return "\n".join(lines)


def _by(document: Mapping[str, Any]) -> str:
    """Say which software trains, if it is not Shardwise; the explanation names the program either way."""
    return trained_by(document) if document.get("runtime", "shardwise") != "shardwise" else ""


def _rejected(document: Mapping[str, Any]) -> str:
    counts: dict[str, int] = {}
    for entry in document["rejected"]:
        counts[entry["kind"]] = counts.get(entry["kind"], 0) + entry["count"]
    found = [f"{count:,} {KINDS[kind]}" for kind, count in counts.items()]
    seconds = format_seconds(document["search_seconds"])
    predicted = "1 strategy" if document["predicted"] == 1 else f"{document['predicted']:,} strategies"
    searched = f"Searched in {seconds}: {predicted} predicted"
    if document["left_out"]:
        searched += f", {document['left_out']:,} left out because they could not win"
    others = f" Of the others {', '.join(found)}; --json has each reason." if found else ""
    return f"{searched}.{others}"


def _scaling(document: Mapping[str, Any]) -> list[str]:
    if "scaling" not in document:
        return []
    header = ["devices", "strategy", "step", "samples/s", "speedup", "efficiency", "$ per million samples"]
    rows = [_scaling_row(row) for row in document["scaling"]]
    worth = document["worth_workers"]
    words = worth_words(worth, document["scaling"])
    return ["", table(header, rows), "", words]


def worth_words(worth: int | None, rows: Sequence[Mapping[str, Any]]) -> str:
    """Say up to which number of devices more of them pay."""
    fitting = [row["workers"] for row in rows if row["strategy"] is not None]
    if worth is None:
        return "No number of devices fits."
    if len(fitting) == 1:
        return f"Of these numbers of devices only {worth} fits."
    if worth == fitting[0]:
        return (
            f"More than {_devices(worth)} do not pay: each added one brings less than half of what the first ones do."
        )
    return f"Up to {_devices(worth)}, each added one brings half or more of what the first ones do."


def _devices(count: int) -> str:
    return "1 device" if count == 1 else f"{count:,} devices"


def _pareto(document: Mapping[str, Any]) -> list[str]:
    """Format the Pareto front of time and memory; empty if it was not requested."""
    if "pareto" not in document:
        return []
    header = ["strategy", "step", "times the fastest", "memory/device", "of the fastest's"]
    rows = [
        [
            row["strategy"],
            format_seconds(row["step_seconds"]),
            f"{row['times_fastest']:.2f}",
            format_bytes(row["memory_bytes"]),
            format_share(row["memory_share"]),
        ]
        for row in document["pareto"]
    ]
    words = "What less memory costs: no strategy is faster than one of these and needs no more."
    return ["", words, "", table(header, rows)]


def _scaling_row(row: Mapping[str, Any]) -> list[str]:
    if row["strategy"] is None:
        return [str(row["workers"]), "does not fit", "-", "-", "-", "-", "-"]
    price = row["dollars_per_million_samples"]
    return [
        str(row["workers"]),
        row["strategy"],
        format_seconds(row["step_seconds"]),
        format_rate(row["samples_per_second"]),
        f"{row['speedup']:.2f}",
        format_share(row["efficiency"]),
        "-" if price is None else f"{price:.2f}",
    ]


def check_summary(document: Mapping[str, Any]) -> str:
    """Say whether a plan file is still valid, with its predicted step time now and when it was made."""
    words = "holds" if document["holds"] else "does not hold"
    lines = [f"{document['plan']}: {document['strategy']} {words}"]
    if document["step_seconds"] is not None:
        planned = document["planned_step_seconds"]
        then = "" if planned is None else f", the file says {format_seconds(planned)}"
        lines.append(f"a step is predicted to take {format_seconds(document['step_seconds'])}{then}")
    return "\n".join([*lines, *document["notes"]])
