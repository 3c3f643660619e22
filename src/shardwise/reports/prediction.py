"""Text of predictions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shardwise.options import FLOAT32
from shardwise.reports.text import UNKNOWN, launch_rows, table, trained_by
from shardwise.units import format_bits, format_bytes, format_rate, format_seconds, format_share


def prediction_table(document: Mapping[str, Any]) -> str:
    """Format a table with one row per strategy and the parts of its step, and notes on the origin of the numbers."""
    lines = [
        f"{document['workload']} on {document['cluster']}{trained_by(document)}",
        *prediction_rows(document["candidates"]),
    ]
    lines += [*dry_run_rows(document["candidates"]), "", *_notes(document)]
    if len(document["candidates"]) == 1:
        lines += launch_rows(document["candidates"][0])
    return "\n".join(lines)


def prediction_rows(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format the table of candidates; empty if there are none."""
    header = ["strategy", "step", "compute", "communication", "exposed", "bubble", "optimizer", "host", "alpha"]
    header += ["memory/device", "fits", "samples/s", "MFU"]
    rows = [_row(candidate) for candidate in candidates]
    return [table(header, rows)] if rows else []


def _row(candidate: Mapping[str, Any]) -> list[str]:
    seconds = ("compute", "communication", "exposed_communication", "bubble", "optimizer", "host")
    return [
        candidate["strategy"],
        _step(candidate),
        *(format_seconds(candidate[f"{name}_seconds"]) for name in seconds),
        f"{candidate['alpha']:.3g}",
        format_bytes(candidate["memory_bytes"]),
        "yes" if candidate["fits"] else "NO",
        format_rate(candidate["samples_per_second"]),
        _utilization(candidate),
    ]


def _step(candidate: Mapping[str, Any]) -> str:
    error = candidate["relative_error"]
    return format_seconds(candidate["step_seconds"]) + ("" if error is None else f" ±{format_share(error)}")


def _utilization(candidate: Mapping[str, Any]) -> str:
    """Format the utilization of the peak in the precision of the computation, and of bf16's if that is another one."""
    own, half, precision = (candidate[n] for n in ("model_flops_utilization", "half_flops_utilization", "precision"))
    if own is None:
        return UNKNOWN
    of_half = "" if half is None or precision != FLOAT32 else f", {format_share(half)} of bf16"
    return f"{format_share(own)} of {precision}{of_half}"


def dry_run_rows(candidates: Sequence[Mapping[str, Any]]) -> list[str]:
    """Format the table of dry runs beside the predictions of the same workers; empty if there are none."""
    header = ["strategy", "worker", "memory predicted", "dry run", "off", "sent predicted", "dry run", "messages"]
    runs = [(candidate["strategy"], candidate["dry_run"]) for candidate in candidates if "dry_run" in candidate]
    notes = [f"{strategy}: {note}" for strategy, run in runs for note in run["notes"]]
    notes += [_too_much(candidate) for candidate in candidates if _dry_run_alone_says_no(candidate)]
    if not runs:
        return []
    timed = [_step_views(strategy, run) for strategy, run in runs if run.get("step_seconds") is not None]
    times = ["", table(["strategy", "step: closed form", "off", "timeline", "off", "dry run"], timed)] if timed else []
    return ["", table(header, [_dry_run(strategy, run) for strategy, run in runs]), *times, *notes]


def _step_views(strategy: str, run: Mapping[str, Any]) -> list[str]:
    """Format the seconds of a step in three views, with their differences from the dry run."""
    errors = run["time_errors"]
    return [
        strategy,
        format_seconds(run["closed_form_seconds"]),
        f"{errors['closed_form']:+.1%}",
        format_seconds(run["timeline_seconds"]),
        f"{errors['timeline']:+.1%}",
        format_seconds(run["step_seconds"]),
    ]


def _dry_run(strategy: str, run: Mapping[str, Any]) -> list[str]:
    predicted = run["predicted"]
    return [
        strategy,
        str(run["rank"]),
        format_bytes(predicted["memory_bytes"]),
        format_bytes(run["memory_bytes"]),
        _off(predicted["memory_bytes"], run["memory_bytes"]),
        format_bytes(predicted["communicated_bytes"]),
        format_bytes(run["communicated_bytes"]),
        "alike" if run["bytes_agree"] and run["order_agrees"] else "NOT ALIKE",
    ]


def _off(predicted: float, run: float) -> str:
    """Format a relative error with its sign, because too little predicted memory is worse than too much."""
    if not run:
        return UNKNOWN
    error = predicted / run - 1
    return f"{error:+.0%}" if abs(error) >= 0.005 else "0%"


def _dry_run_alone_says_no(candidate: Mapping[str, Any]) -> bool:
    return "dry_run" in candidate and candidate["fits"] and _needed(candidate) > candidate["memory_available_bytes"]


def _needed(candidate: Mapping[str, Any]) -> int:
    """Return the bytes of the tensors of a dry run and, as predicted, of what a worker needs beside them."""
    beside = sum(candidate["memory"][name] for name in ("process", "fragments", "context"))
    return int(candidate["dry_run"]["memory_bytes"] + beside)


def _too_much(candidate: Mapping[str, Any]) -> str:
    needed, there = _needed(candidate), candidate["memory_available_bytes"]
    return (
        f"{candidate['strategy']} does not fit: its program as run dry needs {format_bytes(needed)}, a device has "
        f"{format_bytes(there)} usable"
    )


def _links(document: Mapping[str, Any]) -> list[str]:
    """Format the links between the devices, from the innermost level on."""
    words = []
    for link in document.get("links", ()):
        origin = link["origins"].get("bandwidth")
        said = f" ({origin})" if origin else ""
        words.append(f"{link['devices']} devices by {link['name']}, {format_bits(link['bytes_per_second'])} each{said}")
    return [f"links: {'; '.join(words)}"] if words else []


def _slowed(document: Mapping[str, Any]) -> list[str]:
    ranks = [f"rank {rank} computes {times:g} times as long" for rank, times in document.get("slowed", {}).items()]
    return [f"{', '.join(ranks)}; who exchanges with it waits"] if ranks else []


def _notes(document: Mapping[str, Any]) -> list[str]:
    origins: dict[str, list[str]] = {}
    for candidate in document["candidates"]:
        for name, origin in candidate["origins"].items():
            if name not in origins.setdefault(origin, []):
                origins[origin].append(name)
    return [
        document["explanation"],
        *(f"note: {note}" for note in document["notes"]),
        *_slowed(document),
        *_links(document),
        *(f"{origin}: {', '.join(names)}" for origin, names in origins.items()),
        *(f"{entry['strategy']} cannot be: {entry['reason']}" for entry in document["rejected"]),
    ]
