"""Folder of a run: its files, and the checks before a new or resumed run uses it.

runs/image-dp2-1/
    run.json         the request: workload, strategy, workers, options, versions
    metrics.jsonl    one line per step and per evaluation
    messages.jsonl   how each training began and ended, and what it told the user: see `run.training.messages`
    prediction.json, ranks.jsonl, timeline.json, memory.json     see `run.training.extras`
    tensorboard/     the metrics as TensorBoard files, if TensorBoard is installed
    wandb/, mlflow/  the metrics for other trackers, with the run's id there in wandb.json, mlflow.json
    checkpoints/     see `run.checkpoint.checkpoints`
    summary.json     the result: the document that `train --json` prints
    .lock            see `run.training.lock`
"""

from __future__ import annotations

import contextlib
import logging
import os
import platform
import shutil
from collections.abc import Iterator, Mapping
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from shardwise.errors import RunFolderError, ShardwiseError
from shardwise.files import read_regular
from shardwise.launch.context import is_first
from shardwise.run.checkpoint.folder import complete
from shardwise.run.jsonfile import parse_json, read_json, short, write_json
from shardwise.run.training.lock import LOCK, release_lock, take_lock
from shardwise.run.training.messages import MESSAGES

DESCRIPTION, SUMMARY, METRICS, TENSORBOARD = "run.json", "summary.json", "metrics.jsonl", "tensorboard"
CHECKPOINTS = "checkpoints"
PREDICTION, RANKS, TIMELINE, MEMORY = "prediction.json", "ranks.jsonl", "timeline.json", "memory.json"
RUNS = Path("runs")

MOST_BYTES = 1 << 24
"""Largest size of a run.json or summary.json."""

_TRACKED = {TENSORBOARD, "wandb", "wandb.json", "mlflow", "mlflow.json"}
_WITHOUT_STEPS = {DESCRIPTION, METRICS, MESSAGES, LOCK, PREDICTION, RANKS, *_TRACKED}
"""Names in the folder of a run that has taken no step."""

_LONGEST_TEXT = 1000
_FIRST_CHECKPOINT = "first_checkpoint"
_REQUEST: dict[str, tuple[type, ...]] = {
    "workload": (str,),
    "source": (str, type(None)),
    "settings": (dict,),
    "seed": (int,),
    "strategy": (str,),
    "steps": (int, type(None)),
    "epochs": (int, type(None)),
}
"""Fields of a request in run.json, and their types."""

logger = logging.getLogger(__name__)


def create_run(out: Path | None, description: Mapping[str, Any]) -> Path:
    """Make and lock the folder of a new run: `out`, or one in runs/ named after workload and strategy.

    Raises:
        RunFolderError: `out` is in use, or cannot be made.
    """
    try:
        folder = _numbered(description["workload"], description["strategy"]) if out is None else _empty(out)
        write_json(folder / DESCRIPTION, {**description, "created": _now(), "versions": _versions()})
    except OSError as error:
        raise RunFolderError(f"{out or RUNS} cannot be made: {error.strerror}; use another --out") from error
    return folder


def find_run(out: Path | None, workload: str) -> Path:
    """Return the folder of the run to continue: `out`, or the newest run of `workload` in runs/.

    Args:
        out: the run's folder; None: look in runs/.
        workload: name of the workload, or the source that it is loaded from.

    Raises:
        RunFolderError: there is no such run.
    """
    if out is None:
        runs = [folder for folder in RUNS.glob("*") if (folder / DESCRIPTION).is_file() and _is_of(folder, workload)]
        if not runs:
            raise RunFolderError(f"{RUNS}/ holds no run of workload {workload!r} to resume: give its folder with --out")
        return max(runs, key=lambda folder: (folder / DESCRIPTION).stat().st_mtime)
    if not (os.path.lexists(out / DESCRIPTION) or complete(out / CHECKPOINTS)):
        raise RunFolderError(f"{out} holds no run to resume: give --out a run's folder, or leave --resume out")
    return out


def read_summary(folder: Path) -> dict[str, Any]:
    """Read summary.json. Raises RunFolderError if there is none that can be read."""
    summary = read_json(folder / SUMMARY, MOST_BYTES, RunFolderError, "summary")
    if not isinstance(summary, dict):
        raise RunFolderError(f"{folder / SUMMARY} is not the summary of a run: it holds {short(summary)}")
    return summary


def is_finished(folder: Path) -> bool:
    """Return whether the run in `folder` reached its end, instead of being ended by a signal, a failure or a kill."""
    try:
        return not read_summary(folder).get("stopped")
    except RunFolderError:
        return False


def _is_of(folder: Path, workload: str) -> bool:
    """Return whether a folder has a run of a workload; a damaged description is reported and counts as no."""
    try:
        content = read_run(folder)
    except RunFolderError as error:
        tell("%s; it is passed over: to go on with it, give --out %s", error, folder)
        return False
    return workload in (content["source"], content["workload"])


def reopen_run(folder: Path, description: Mapping[str, Any]) -> Path:
    """Lock a run's folder, and note the resume in run.json. A damaged run.json is renamed and written anew.

    Raises:
        RunFolderError: it is a run of another workload, or another process uses it.
    """
    take_lock(folder)
    try:
        before = _before(folder, description)
        again = {**description, "resumed": _now(), "versions": _versions()}
        write_json(folder / DESCRIPTION, {**before, "resumes": [*before.get("resumes", []), again]})
    except OSError as error:
        release_lock(folder)
        raise RunFolderError(f"{folder / DESCRIPTION} cannot be written: {error.strerror}") from error
    except BaseException:
        release_lock(folder)
        raise
    return folder


def _before(folder: Path, description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the description with which the run was begun; if it is damaged, move it away and return a new one.

    Raises:
        RunFolderError: it is a run of another workload.
    """
    try:
        before = read_run(folder)
    except RunFolderError:
        with contextlib.suppress(FileNotFoundError):
            (folder / DESCRIPTION).replace(folder / f"{DESCRIPTION}.damaged")
        return {**description, "created": _now(), "versions": _versions()}
    if before["workload"] != description["workload"]:
        raise RunFolderError(
            f"{folder} holds a run of workload {before['workload']!r}, not {description['workload']!r}: "
            "use another --out"
        )
    return before


def read_run(folder: Path) -> dict[str, Any]:
    """Read run.json and check the types of its values. Raises RunFolderError if it cannot be read."""
    text = read_regular(folder / DESCRIPTION, MOST_BYTES, RunFolderError, "run description")
    try:
        content = parse_json(text)
        _check_request(content, required=True)
        resumes = content.get("resumes", [])
        if not isinstance(resumes, list):
            raise ValueError(f"'resumes' is {short(resumes)}")
        for resumed in resumes:
            _check_request(resumed, required=False)
    except ValueError as error:
        raise RunFolderError(f"{folder / DESCRIPTION} is not the description of a run: {error}") from None
    return dict(content)


def _check_request(content: object, *, required: bool) -> None:
    """Check the fields of a request and their types. Raises ValueError.

    Args:
        content: the request.
        required: whether all fields must be there.
    """
    if not isinstance(content, dict):
        raise ValueError(f"{short(content)} is no JSON object")
    for key, types in _REQUEST.items():
        if key not in content and required:
            raise ValueError(f"there is no {key!r}")
        value = content.get(key)
        if key in content and (type(value) not in types or (isinstance(value, str) and len(value) > _LONGEST_TEXT)):
            raise ValueError(f"{key!r} is {short(value)}")
    if any(type(value) is not str for value in content.get("settings", {}).values()):
        raise ValueError(f"'settings' is {short(content['settings'])}")


def last_request(description: Mapping[str, Any]) -> dict[str, Any]:
    """Return the last request of a run: that of its last resume, else the one that it was begun with."""
    return {**description, **(description.get("resumes") or [{}])[-1]}


def check_checkpoints(folder: Path) -> None:
    """Check that a run to continue still has the checkpoints that it wrote; a run that wrote none begins anew.

    Raises:
        RunFolderError: the checkpoints are gone.
    """
    if not complete(folder / CHECKPOINTS) and _wrote_checkpoints(folder):
        raise RunFolderError(
            f"{folder} has lost its checkpoints: {folder / CHECKPOINTS} holds none; put them back, or begin anew with "
            "another --out"
        )


def check_described(folder: Path, problem: RunFolderError, *, open_ends: bool) -> None:
    """Warn that a run continues without its description, which cannot be read.

    Args:
        folder: the run's folder.
        problem: error of reading the description.
        open_ends: True if the request leaves choices open that only the description could fill in.

    Raises:
        RunFolderError: there is no checkpoint to continue from, or the request has open choices.
    """
    if not complete(folder / CHECKPOINTS):
        raise problem
    if open_ends:
        raise RunFolderError(
            f"{problem}; its checkpoints are there: to go on from them, give the run's --strategy, and its --steps or "
            "--epochs, with --set and --seed where it had them"
        )
    tell("%s; the run goes on from its checkpoints as the command line says", problem)


def _wrote_checkpoints(folder: Path) -> bool:
    """Return whether a run has written a checkpoint: run.json notes one, or its summary counts steps.

    A run that reaches its end writes a checkpoint there.
    """
    if _FIRST_CHECKPOINT in read_run(folder):
        return True
    try:
        return bool(read_summary(folder).get("steps", 0) != 0)
    except RunFolderError:
        return False


def note_checkpoint(folder: Path, step: int) -> None:
    """Note in run.json, if there is one, the step of the run's first checkpoint. Raises OSError."""
    with contextlib.suppress(RunFolderError):
        content = read_run(folder)
        if _FIRST_CHECKPOINT not in content:
            write_json(folder / DESCRIPTION, {**content, _FIRST_CHECKPOINT: step})


def write_summary(folder: Path, summary: Mapping[str, Any]) -> None:
    """Write summary.json. Raises ShardwiseError if it cannot be written."""
    with told_writing(folder / SUMMARY):
        write_json(folder / SUMMARY, summary)


@contextlib.contextmanager
def told_writing(path: Path) -> Iterator[None]:
    """Turn an OSError in the block, which writes the file `path` of a run, into an error of one line.

    Raises:
        ShardwiseError: the file cannot be written, for example because the disk is full.
    """
    try:
        yield
    except OSError as error:
        raise ShardwiseError(
            f"{path} cannot be written: {error.strerror}; make room, then go on with --resume"
        ) from error


def tell(message: str, *values: object) -> None:
    """Log a warning of one line; under an outer launcher, on rank 0 only."""
    if is_first():
        logger.warning(message, *values)


def discard_unused(folder: Path) -> None:
    """Remove a new run's folder in which no step was taken, so that the command can be repeated unchanged."""
    metrics = folder / METRICS
    unused = not metrics.exists() or metrics.stat().st_size == 0
    if unused and {path.name for path in folder.iterdir()} <= _WITHOUT_STEPS:
        shutil.rmtree(folder)


def _empty(out: Path) -> Path:
    _check_unused(out)
    out.mkdir(parents=True, exist_ok=True)
    take_lock(out)
    try:
        _check_unused(out)  # again: another process may have begun here before this one got the lock
    except RunFolderError:
        release_lock(out)
        raise
    return out


def _check_unused(out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise RunFolderError(f"{out} is a file: --out must be a folder")
    if (out / DESCRIPTION).exists():
        raise RunFolderError(f"{out} holds another run: use --resume to go on with it, or another --out")
    if out.exists() and any(path.name != LOCK for path in out.iterdir()):
        raise RunFolderError(f"{out} is not empty: use another --out")


def _numbered(workload: str, strategy: str) -> Path:
    folder = new_folder("-".join([workload, *strategy.replace("=", "").split(",")]))
    take_lock(folder)
    return folder


def new_folder(name: str) -> Path:
    """Make a folder in runs/ that has a name and a number that is free. Raises OSError if it cannot be made."""
    name = name.replace(os.sep, "-").replace(" ", "-")
    RUNS.mkdir(exist_ok=True)
    number = 1
    while True:
        folder = RUNS / f"{name}-{number}"
        try:
            folder.mkdir()
        except FileExistsError:
            number += 1
        else:
            return folder


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _versions() -> dict[str, str]:
    return {"python": platform.python_version(), "torch": version("torch"), "shardwise": version("shardwise")}
