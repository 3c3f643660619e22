"""What a person reads of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.report.text import table
from shardwise.units import format_bytes, format_rate, format_seconds, format_share


def prediction_table(document: Mapping[str, Any]) -> str:
    """One row per strategy, where its time goes, and what the numbers rest on."""
    lines = [f"{document['workload']} on {document['cluster']}", *prediction_rows(document["candidates"])]
    lines += [*dry_run_rows(document["candidates"]), "", *_notes(document)]
    return "\n".join(lines)


def prediction_rows(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of candidates; nothing where there are none."""
    header = ["strategy", "step", "compute", "communication", "exposed", "bubble", "optimizer", "host", "alpha"]
    header += ["memory/device", "fits", "samples/s", "MFU"]
    rows = [_row(candidate) for candidate in candidates]
    return [table(header, rows)] if rows else []


def _row(candidate: Mapping[str, Any]) -> list[str]:
    seconds = ("step", "compute", "communication", "exposed_communication", "bubble", "optimizer", "host")
    utilization = candidate["model_flops_utilization"]
    return [
        candidate["strategy"],
        *(format_seconds(candidate[f"{name}_seconds"]) for name in seconds),
        f"{candidate['alpha']:.3g}",
        format_bytes(candidate["memory_bytes"]),
        "yes" if candidate["fits"] else "NO",
        format_rate(candidate["samples_per_second"]),
        "-" if utilization is None else format_share(utilization),
    ]


def dry_run_rows(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """The table of dry runs beside what was predicted of the same workers; nothing where there are none."""
    header = ["strategy", "worker", "memory predicted", "dry run", "off", "sent predicted", "dry run", "messages"]
    runs = [(candidate["strategy"], candidate["dry_run"]) for candidate in candidates if "dry_run" in candidate]
    notes = [f"{strategy}: {note}" for strategy, run in runs for note in run["notes"]]
    return ["", table(header, [_dry_run(strategy, run) for strategy, run in runs]), *notes] if runs else []


def _dry_run(strategy: str, run: Mapping[str, Any]) -> list[str]:
    predicted = run["predicted"]
    return [
        strategy,
        str(run["rank"]),
        format_bytes(predicted["memory_bytes"]),
        format_bytes(run["memory_bytes"]),
        format_share(run["memory_error"]),
        format_bytes(predicted["communicated_bytes"]),
        format_bytes(run["communicated_bytes"]),
        "alike" if run["bytes_agree"] else "NOT ALIKE",
    ]


def _notes(document: Mapping[str, Any]) -> list[str]:
    origins: dict[str, list[str]] = {}
    for candidate in document["candidates"]:
        for name, origin in candidate["origins"].items():
            if name not in origins.setdefault(origin, []):
                origins[origin].append(name)
    return [
        document["explanation"],
        *(f"{origin}: {', '.join(names)}" for origin, names in origins.items()),
        *(f"{entry['strategy']} cannot be: {entry['reason']}" for entry in document["rejected"]),
    ]
