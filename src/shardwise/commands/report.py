"""Reports: gather the document of a page from folders or from the result of a command, and write the page."""

from __future__ import annotations

import platform
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from shardwise.commands.report_files import (
    COMPARISON,
    VERIFICATION,
    WHAT_IF,
    is_run,
    optional,
    read_entry,
    runs_in,
)
from shardwise.errors import RunFolderError, ShardwiseError
from shardwise.launch.context import is_first
from shardwise.reports.page.page import render
from shardwise.reports.page.panels.what_if import best_of
from shardwise.reports.page.values import mapping, number, objects, text, texts
from shardwise.run.jsonfile import replace_file, write_json
from shardwise.run.training.log import finite
from shardwise.run.training.run_folder import tell
from shardwise.version import __version__

REPORT = "report.html"
"""Name of the report that a run and a comparison leave in their folder."""


@contextmanager
def leaving_report(folder: Path | None, what_if: Callable[[], Mapping[str, Any]] | None = None) -> Iterator[None]:
    """Leave a report in a run's or a comparison's folder after the block, also if the block fails or is interrupted.

    A run never fails because of its report: if it cannot be written, a line says so.

    Args:
        folder: the folder; None: nothing is written.
        what_if: function that returns the document of the what-if panel, which is kept in the folder; None: without.
    """
    try:
        yield
    except BaseException:
        _leave(folder, None)
        raise
    _leave(folder, what_if)


def _leave(folder: Path | None, what_if: Callable[[], Mapping[str, Any]] | None) -> None:
    if folder is None or not is_first() or not (is_run(folder) or runs_in(folder)):
        return
    try:
        if what_if is not None:
            write_json(folder / WHAT_IF, finite(dict(what_if())))
        write_report(folder / REPORT, runs_document([folder]))
    except (OSError, ShardwiseError) as error:
        tell("no report: %s", error)
    except Exception as error:  # a mistake of ours: the training is done, and its result must be returned
        tell("no report: %s: %s", type(error).__name__, error)


def report_in(folder: str | Path | None) -> dict[str, str]:
    """Return the path of the report that a folder has, as an entry of a command's document; empty if it has none."""
    path = None if folder is None else Path(folder) / REPORT
    return {} if path is None or not path.exists() else {"report": str(path)}


def write_report(path: Path, document: Mapping[str, Any]) -> None:
    """Write the page of a report's document.

    Raises:
        RunFolderError: it cannot be written.
    """
    stated = {"made": f"Made by Shardwise {__version__}, {_now()}", **document}
    try:
        replace_file(path, render(stated).encode())
    except OSError as error:
        raise RunFolderError(f"{path} cannot be written: {error.strerror}; give another --out") from error


def runs_document(folders: Sequence[Path]) -> dict[str, Any]:
    """Return the report's document of one or several runs, or of comparisons.

    Raises:
        RunFolderError: a folder has no run.
    """
    notes: list[str] = []
    parts = [_folder_document(folder, notes) for folder in folders]
    if len(parts) == 1:
        return {**parts[0], "notes": [*parts[0]["notes"], *notes]}
    entries = [entry for part in parts for entry in part["entries"]]
    titles = dict.fromkeys(part["title"] for part in parts)
    first: dict[str, Any] = next((part for part in parts if part.get("what_if")), parts[0])
    return {
        **{key: first[key] for key in ("what_if", "scaling", "worth_workers", "cluster") if key in first},
        "kind": "runs",
        "title": " and ".join(titles),
        "entries": _distinct(entries),
        "rejected": [each for part in parts for each in part.get("rejected", [])],
        "commands": list(dict.fromkeys(command for part in parts for command in part["commands"])),
        "facts": parts[0]["facts"],
        "notes": [*(note for part in parts for note in part["notes"]), *notes],
    }


def _folder_document(folder: Path, notes: list[str]) -> dict[str, Any]:
    if (folder / VERIFICATION).exists() and not is_run(folder):
        return command_document("verify", optional(folder / VERIFICATION, notes.append) or {})
    if is_run(folder):
        entries, comparison = [read_entry(folder, notes.append)], None
    elif (folder / COMPARISON).exists() or runs_in(folder):
        comparison = optional(folder / COMPARISON, notes.append)
        entries = _compared(folder, comparison or {}, notes)
    else:
        there = "holds no run" if folder.is_dir() else "is not a folder" if folder.exists() else "does not exist"
        raise RunFolderError(f"{folder} {there}: give the folder of a run, which has a run.json, or of a comparison")
    what_if = optional(folder / WHAT_IF, notes.append)
    first = next((entry for entry in entries if entry.get("request")), {})
    request = first.get("request", {})
    title = request.get("workload") or (comparison or {}).get("workload") or folder.name
    clusters = [found for entry in entries if (found := entry.get("prediction", {}).get("cluster"))]
    return {
        "kind": "run" if is_run(folder) else "compare",
        "title": str(title),
        "entries": _distinct(entries),
        "cluster": clusters[0] if clusters else _machine(entries),
        "comparison": comparison,
        "rejected": (comparison or {}).get("rejected", []),
        "commands": _train_commands(entries) + [f"shardwise report {shlex.quote(str(folder))}"],
        "facts": {**_versions(request), "created": request.get("created", "not recorded")},
        "notes": [note for entry in entries for note in _notes_of(entry)],
        **what_if_parts(what_if),
    }


def _compared(folder: Path, comparison: Mapping[str, Any], notes: list[str]) -> list[dict[str, Any]]:
    """Return the entries of a comparison: those of its runs, and those of strategies that have none."""
    entries = {run.name: read_entry(run, notes.append) for run in runs_in(folder)}
    if comparison.get("interrupted") is True:
        notes.append("The comparison was interrupted: it shows what was measured until then.")
    samples = mapping(comparison, "samples")
    by_hand = [{**row, "by_hand": True} for row in objects(comparison, "by_hand")]
    rows = [row for row in [*objects(comparison, "results"), *by_hand] if text(row, "strategy")]
    for row in rows:
        name, strategy = Path(str(row.get("run") or "")).name, text(row, "strategy")
        entry = entries.get(name) or next((e for e in entries.values() if e["strategy"] == strategy), None)
        if entry is None:
            spelled = text(row, "beside") if row.get("by_hand") else strategy
            own = {"by_hand": True, "summary": {}} if row.get("by_hand") else {"summary": _as_summary(row)}
            entry = {"label": strategy, "strategy": spelled, **own}
            entries[strategy] = entry
        entry["samples"] = samples.get(strategy, [])
        if row.get("measured_seconds") is not None:
            entry["measured_seconds"], entry["measured_rate"] = row["measured_seconds"], row.get("samples_per_second")
        entry["failure"] = text(row, "failed")
    order = [text(row, "strategy") for row in rows]
    return sorted(entries.values(), key=lambda e: order.index(e["label"]) if e["label"] in order else len(order))


def _as_summary(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return a row of a comparison in the keys of a summary."""
    renamed = {"measured_seconds": "step_seconds", "measured_memory_bytes": "memory_bytes"}
    return {renamed.get(key, key): value for key, value in row.items()}


def _distinct(entries: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the entries with labels that differ: those of one strategy get the names of their folders."""
    labels = [entry["label"] for entry in entries]
    return [
        {**entry, "label": f"{entry['label']} ({Path(entry['folder']).name})"}
        if labels.count(entry["label"]) > 1 and entry.get("folder")
        else entry
        for entry in entries
    ]


def _notes_of(entry: Mapping[str, Any]) -> list[str]:
    return [f"{entry['label']}: {note}" for note in texts(entry, "summary", "notes")]


def _machine(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    return {"name": "this machine"} if any(entry.get("request") for entry in entries) else {}


def _versions(request: Mapping[str, Any]) -> dict[str, str]:
    versions = request.get("versions")
    return {str(k): str(v) for k, v in versions.items()} if isinstance(versions, dict) else {}


def _train_commands(entries: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the commands that repeat the runs; those that were started from Python have none."""
    found = []
    for entry in entries:
        request = entry.get("request") or {}
        if isinstance(request.get("source"), str):
            words = ["shardwise", "train", request["source"], "--strategy", str(request.get("strategy"))]
            for name, value in request.get("settings", {}).items():
                words += ["--set", f"{name}={value}"]
            for name in ("steps", "epochs", "seed"):
                words += [] if request.get(name) is None else [f"--{name}", str(request[name])]
            found.append(shlex.join(words))
    return list(dict.fromkeys(found))


# ---- pages of other commands -----------------------------------------------------------------------------------------


def command_document(kind: str, document: Mapping[str, Any], words: Sequence[str] = ()) -> dict[str, Any]:
    """Return the report's document of `verify`, `validate` or `calibrate`.

    Args:
        kind: the command.
        document: its JSON document.
        words: the command line that repeats it; empty if there is none.
    """
    key = {"verify": "verification", "validate": "validation", "calibrate": "calibration"}[kind]
    titles = {"validate": "Predictions against published runs", "calibrate": "This machine, measured"}
    return {
        "kind": kind,
        "title": titles.get(kind, str(document.get("workload", "Verification"))),
        key: dict(document),
        "entries": [],
        "commands": [shlex.join(words)] if words else [],
        "facts": software(),
        "notes": [each for each in document.get("notes", []) if isinstance(each, str)],
    }


def predicted_document(
    kind: str,
    document: Mapping[str, Any],
    details: Mapping[str, Mapping[str, Any]],
    what_if: Mapping[str, Any] | None,
    words: Sequence[str] = (),
) -> dict[str, Any]:
    """Return the report's document of `simulate` or `plan`.

    Args:
        kind: the command.
        document: its JSON document.
        details: strategy -> what is known of it beside its candidate: `timeline`, `model`, `cluster`.
        what_if: document of `what_if`; None if it was not made.
        words: the command line that repeats it; empty if there is none.
    """
    entries = [
        {
            "label": candidate["strategy"],
            "strategy": candidate["strategy"],
            "prediction": {"candidate": candidate, **details.get(candidate["strategy"], {})},
            "reasons": _reasons(details.get(candidate["strategy"], {})),
        }
        for candidate in document["candidates"]
    ]
    cluster = next((each["cluster"] for each in details.values() if each.get("cluster")), {"name": document["cluster"]})
    curve = {key: document[key] for key in ("scaling", "worth_workers") if key in document}
    return {
        "kind": kind,
        "title": document["workload"],
        "best": document["best"],
        "entries": entries,
        "cluster": {**cluster, "links": document.get("links") or cluster.get("links", [])},
        "rejected": document["rejected"][:100],
        "commands": [shlex.join(words)] if words else [],
        "facts": software(),
        "notes": [*document.get("notes", []), *str(document["explanation"]).split("\n\n")],
        **what_if_parts(what_if),
        **curve,
    }


def _reasons(details: Mapping[str, Any]) -> dict[str, str]:
    reason = details.get("timeline_reason")
    return {"timeline": str(reason), "predicted_timeline": str(reason)} if reason else {}


def what_if_parts(what_if: Mapping[str, Any] | None) -> dict[str, Any]:
    """Return the what-if panel's document and the scaling curve that it holds; only a reason if there is none."""
    cells = objects(what_if, "cells")
    if what_if is None or not cells:
        reason = text(what_if, "reason") or "nothing was predicted for other settings"
        return {"what_if": {}, "what_if_reason": reason, "scaling_reason": reason}
    from shardwise.planner.worth import last_worth

    here = mapping(what_if, "here")
    found = {
        int(number(cell, "devices") or 0): best_of(cell)
        for cell in cells
        if cell.get("bandwidth") == here.get("bandwidth") and cell.get("batch") == here.get("batch")
    }
    rates = [(count, number(best, "samples_per_second") or 0.0) for count, best in sorted(found.items()) if count]
    base = next(((count, rate) for count, rate in rates if rate), None)
    rows = []
    for count, rate in rates:
        best, hourly = found[count], number(what_if, "dollars_per_hour", str(count))
        speedup = rate / base[1] if base and rate else None
        rows.append(
            {
                "workers": count,
                "strategy": text(best, "strategy") or None,
                "step_seconds": number(best, "step_seconds"),
                "samples_per_second": rate or None,
                "speedup": speedup,
                "efficiency": speedup and base and speedup * base[0] / count,
                "dollars_per_million_samples": hourly / 3600 / rate * 1e6 if hourly and rate else None,
            }
        )
    return {
        "what_if": dict(what_if),
        "batch_size": here.get("batch"),
        "scaling": rows,
        "worth_workers": last_worth(rates),
    }


def software() -> dict[str, str]:
    """Return the versions of what a result depends on."""
    found = {"shardwise": __version__, "python": platform.python_version()}
    with suppress(PackageNotFoundError):
        found["torch"] = version("torch")
    return found


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
