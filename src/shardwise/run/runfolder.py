"""The folder of a run: where it is, what is in it, and whether a new run may use it.

runs/image-dp2-1/
    run.json         what was asked for: workload, strategy, workers, options, versions
    metrics.jsonl    one line per step and per evaluation
    tensorboard/     the same for TensorBoard, where it is installed
    checkpoints/     see `run.checkpoint`
    summary.json     how it ended: what `train --json` prints
"""

from __future__ import annotations

import json
import os
import platform
import shutil
from collections.abc import Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardwise.errors import RunFolderError
from shardwise.run.jsonfile import write_json

DESCRIPTION, SUMMARY, METRICS, TENSORBOARD = "run.json", "summary.json", "metrics.jsonl", "tensorboard"
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
    write_json(folder / DESCRIPTION, {**description, "created": created, "versions": _versions()})
    return folder


def find_run(out: Path | None, workload: str) -> Path:
    """The folder of a run to go on with: `out`, or the newest in runs/ of `workload` (its name, or where it is from).

    Raises:
        RunFolderError: there is none.
    """
    if out is None:
        described = [folder for folder in RUNS.glob("*") if (folder / DESCRIPTION).is_file()]
        runs = [folder for folder in described if workload in (read_run(folder)[key] for key in ("source", "workload"))]
        if not runs:
            raise RunFolderError(f"{RUNS}/ holds no run of workload {workload!r} to resume: give its folder with --out")
        return max(runs, key=lambda folder: (folder / DESCRIPTION).stat().st_mtime)
    if not (out / DESCRIPTION).is_file():
        raise RunFolderError(f"{out} holds no run to resume: give --out a run's folder, or leave --resume out")
    return out


def reopen_run(folder: Path, description: Mapping[str, Any]) -> Path:
    """Notes in a run's folder that it goes on, and how.

    Raises:
        RunFolderError: it is a run of another workload.
    """
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
    write_json(folder / DESCRIPTION, {**before, "resumes": [*before.get("resumes", []), again]})
    return folder


def read_run(folder: Path) -> dict[str, Any]:
    """What a run's run.json says. Raises RunFolderError where it cannot be read."""
    try:
        content: dict[str, Any] = json.loads((folder / DESCRIPTION).read_text())
        _ = [content[key] for key in ("workload", "source", "settings", "seed", "strategy", "steps", "epochs")]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunFolderError(f"{folder / DESCRIPTION} is not the description of a run: {error}") from error
    return content


def last_request(description: Mapping[str, Any]) -> dict[str, Any]:
    """What a run was last asked for: at its beginning, or when it was last resumed."""
    return {**description, **(description.get("resumes") or [{}])[-1]}


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Writes how the run ended."""
    write_json(folder / SUMMARY, summary)


def discard_unused(folder: Path) -> None:
    """Removes a new run's folder in which no step was taken, so that the same command can be given again."""
    metrics = folder / METRICS
    unused = not metrics.exists() or metrics.stat().st_size == 0
    if unused and {path.name for path in folder.iterdir()} <= {DESCRIPTION, METRICS, TENSORBOARD}:
        shutil.rmtree(folder)


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


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": version("torch"), "shardwise": version("shardwise")}
