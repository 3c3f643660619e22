"""The folder of a run: where it is, what is in it, and whether a new run may use it.

runs/image-dp2-1/
    run.json         what was asked for: workload, strategy, workers, options, versions
    metrics.jsonl    one line per step and per evaluation
    checkpoints/     see `run.checkpoint`
    summary.json     how it ended: what `train --json` prints
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardwise.errors import RunFolderError

DESCRIPTION, SUMMARY = "run.json", "summary.json"
RUNS = Path("runs")


def create_run(out: Path | None, description: Mapping[str, Any]) -> Path:
    """Makes the folder of a new run: `out`, or one in runs/ named after workload and strategy.

    Raises:
        RunFolderError: `out` is in use, or cannot be made.
    """
    try:
        folder = _numbered(description["workload"], description["strategy"]) if out is None else _empty(out)
    except OSError as error:
        raise RunFolderError(f"{out or RUNS} cannot be made: {error.strerror}; use another --out") from error
    created = datetime.now(timezone.utc).isoformat(timespec="seconds")
    _write(folder / DESCRIPTION, {**description, "created": created, "versions": _versions()})
    return folder


def reopen_run(out: Path | None, description: Mapping[str, Any]) -> Path:
    """The folder of a run that goes on: `out`, or the newest in runs/ of the same workload.

    Raises:
        RunFolderError: there is none, or it is a run of another workload.
    """
    folder = out or _newest(description["workload"])
    if not (folder / DESCRIPTION).is_file():
        raise RunFolderError(f"{folder} holds no run to resume: give --out a run's folder, or leave --resume out")
    before = read_run(folder)
    if before["workload"] != description["workload"]:
        raise RunFolderError(
            f"{folder} holds a run of workload {before['workload']!r}, not {description['workload']!r}: "
            "use another --out"
        )
    again = {
        **description,
        "resumed": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "versions": _versions(),
    }
    _write(folder / DESCRIPTION, {**before, "resumes": [*before.get("resumes", []), again]})
    return folder


def read_run(folder: Path) -> dict[str, Any]:
    """What a run's run.json says. Raises RunFolderError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
    except (OSError, ValueError) as error:
        raise RunFolderError(f"{folder / DESCRIPTION} cannot be read: {error}") from error
    return content


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes how the run ended."""
    _write(folder / SUMMARY, summary)


def discard_unused(folder: Path) -> None:
    """Removes a new run's folder in which no step was taken, so that the same command can be given again."""
    if {path.name for path in folder.iterdir()} == {DESCRIPTION}:
        (folder / DESCRIPTION).unlink()
        folder.rmdir()


def _empty(out: Path) -> Path:
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file: --out must be a folder")
    if (out / DESCRIPTION).exists():
        raise RunFolderError(f"{out} holds another run: use --resume to go on with it, or another --out")
    if out.exists() and any(out.iterdir()):
        raise RunFolderError(f"{out} is not empty: use another --out")
    out.mkdir(parents=True, exist_ok=True)
    return out


def _numbered(workload: str, strategy: str) -> Path:
    name = "-".join([workload, *strategy.replace("=", "").split(",")]).replace(os.sep, "-").replace(" ", "-")
    RUNS.mkdir(exist_ok=True)
    number = 1
    while True:
        try:
            (RUNS / f"{name}-{number}").mkdir()
        except FileExistsError:
            number += 1
        else:
            return RUNS / f"{name}-{number}"


def _newest(workload: str) -> Path:
    described = [folder for folder in RUNS.glob("*") if (folder / DESCRIPTION).is_file()]
    runs = [folder for folder in described if read_run(folder)["workload"] == workload]
    if not runs:
        raise RunFolderError(f"{RUNS}/ holds no run of workload {workload!r} to resume: give its folder with --out")
    return max(runs, key=lambda folder: (folder / DESCRIPTION).stat().st_mtime)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(path)


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": version("torch"), "shardwise": version("shardwise")}
