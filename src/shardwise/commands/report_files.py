"""Read the folders of runs and comparisons for reports: files only, and whatever is missing or damaged is noted."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from shardwise.errors import RequestError, RunFolderError
from shardwise.files import check_regular
from shardwise.reports.page.values import number, text
from shardwise.run.jsonfile import parse_record, read_json
from shardwise.run.training.run_folder import (
    DESCRIPTION,
    MEMORY,
    METRICS,
    PREDICTION,
    RANKS,
    SUMMARY,
    TIMELINE,
    last_request,
    read_run,
)

COMPARISON, VERIFICATION, WHAT_IF = "compare.json", "verification.json", "what_if.json"
"""Names of the documents of commands that reports read, beside the files of `run_folder`."""

MOST_BYTES = 1 << 28
"""Largest size of a file that is read for a report."""

MOST_LINES = 1_000_000
"""Largest number of lines of a file that are read for a report."""

Notes = Callable[[str], None]
"""Function that takes a sentence about what could not be read."""


def is_run(folder: Path) -> bool:
    """Return whether a folder has files of a run."""
    return any((folder / name).exists() for name in (DESCRIPTION, SUMMARY, METRICS))


def runs_in(folder: Path) -> list[Path]:
    """Return the folders of runs in a folder, by name."""
    return sorted(each for each in folder.iterdir() if each.is_dir() and is_run(each)) if folder.is_dir() else []


def left_out_note(prediction: Mapping[str, Any]) -> dict[str, str]:
    """Return the note on operations of a predicted step that are not shown, as an entry; empty if all are."""
    left = number(prediction, "timeline_left_out")
    if not left:
        return {}
    return {"timeline_note": f"Of the predicted step the {left:,.0f} shortest operations were left out."}


def read_entry(folder: Path, note: Notes) -> dict[str, Any]:
    """Return the entry of a report's document for the run in a folder; see `reports.page.entry`."""
    reasons: dict[str, str] = {}
    request = _request(folder, note)
    summary = optional(folder / SUMMARY, note)
    if summary is None and not (folder / SUMMARY).exists():
        note(f"{folder} has no {SUMMARY}: the run has not ended, or was ended before it could write one.")
    steps, evaluations = _metrics(folder, note)
    prediction = optional(folder / PREDICTION, note) or {}
    if not prediction:
        reasons |= dict.fromkeys(("predicted_timeline", "model"), f"the run's folder has no {PREDICTION}")
    for key in ("reason", "timeline_reason"):
        if prediction.get(key):
            reasons["predicted_timeline" if key == "timeline_reason" else "prediction"] = str(prediction[key])
    why = text(summary, "reasons", "predicted_seconds")
    if why:
        reasons.setdefault("prediction", why)
    prediction |= left_out_note(prediction)
    ranks = list(json_lines(folder / RANKS, note)) if (folder / RANKS).exists() else []
    if not ranks:
        reasons["ranks"] = f"the run's folder has no {RANKS}"
    return {
        "label": (request or summary or {}).get("strategy", folder.name),
        "strategy": (request or summary or prediction).get("strategy", ""),
        "folder": str(folder),
        "request": request,
        "summary": summary or {},
        "steps": steps,
        "evaluations": evaluations,
        "prediction": prediction,
        "ranks": ranks,
        "timeline": optional(folder / TIMELINE, note) or {},
        "memory": optional(folder / MEMORY, note) or {},
        "reasons": reasons,
    }


def optional(path: Path, note: Notes) -> dict[str, Any] | None:
    """Return a JSON object that may be missing. Returns None, and notes it, if it is damaged."""
    if not path.exists():
        return None
    try:
        found = read_json(path, MOST_BYTES, RunFolderError, path.stem)
    except RequestError as error:
        note(f"{error}; it is left out.")
        return None
    if not isinstance(found, dict):
        note(f"{path} is no JSON object; it is left out.")
        return None
    return found


def json_lines(path: Path, note: Notes) -> list[dict[str, Any]]:
    """Return the JSON objects of a file with one on each line; damaged and half lines are left out, and noted."""
    try:
        check_regular(path, RunFolderError, path.stem, MOST_BYTES)
        lines = path.read_bytes().split(b"\n")
    except (OSError, RequestError) as error:
        note(f"{error}; it is left out.")
        return []
    half = lines.pop()
    records = list(map(parse_record, lines[:MOST_LINES]))
    found = [record for record in records if record is not None]
    damaged = len(records) - len(found)
    if damaged:
        note(f"{path}: {damaged} damaged line{'s are' if damaged > 1 else ' is'} left out.")
    if half:
        note(f"{path} ends in half a line, of a step that was being written; it is left out.")
    return found


def _request(folder: Path, note: Notes) -> dict[str, Any]:
    try:
        return last_request(read_run(folder))
    except RunFolderError as error:
        note(f"{error}; what it would tell is missing.")
        return {}


def _metrics(folder: Path, note: Notes) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the steps and the evaluations of a run."""
    if not (folder / METRICS).exists():
        note(f"{folder} has no {METRICS}: no step was logged.")
        return [], []
    lines = json_lines(folder / METRICS, note)
    return [each for each in lines if "evaluation" not in each], [each for each in lines if "evaluation" in each]
