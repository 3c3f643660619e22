"""Export of a run's trained weights to one plain file, assembled from the chunks in one of its checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from shardwise.errors import CheckpointError, RunFolderError
from shardwise.parallel.state.layout import Tile
from shardwise.run.checkpoint.checkpoints import not_finite
from shardwise.run.checkpoint.folder import damage, final_path, newest_whole, step_of
from shardwise.run.checkpoint.headers import header_problem
from shardwise.run.checkpoint.index import Index, Stored
from shardwise.run.checkpoint.safetensors_file import write_tensors
from shardwise.workload.losses import without_loss

MOST_TIMES = 64
"""Largest ratio of an export's size to that of the stored weights: tied weights are written under all their names."""

_PREFIX, _AVERAGE = "model/", "average/"


def export_safetensors(run: Path, out: Path, *, best: bool = False) -> None:
    """Write the full plain weights of a run's newest checkpoint to one file, tied weights under each of their names.

    With `best` it is the checkpoint at which the metric of the workload's first evaluation was best.

    `model.load_state_dict(safetensors.torch.load_file(out))` reads it. Memory is bounded by the largest tensor.

    Raises:
        RunFolderError: the run does not exist or has no checkpoint, or `out` already exists or cannot be written; or
            the best is asked for, and the run has not evaluated or has lost it.
        CheckpointError: all checkpoints of the run are damaged or not finite, or the best one is.
    """
    run, out = Path(run), Path(out)
    if run.is_dir() and out.exists():
        raise RunFolderError(f"{out} is there already: remove it, or give another name")
    folder, stored = newest_weights(run, best=best)
    partial = out.with_name(f".{out.name}.partial")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)
        try:
            _export(folder, stored, partial)
            partial.rename(out)
        finally:
            partial.unlink(missing_ok=True)
    except OSError as error:
        raise RunFolderError(f"{out} cannot be written: {error.strerror}; give a file in another folder") from error


def newest_weights(run: Path, *, best: bool = False) -> tuple[Path, dict[str, Stored]]:
    """Return a run's newest checkpoint, or its best one, and the weights in it by all their names.

    Raises:
        RunFolderError: the run does not exist or has no checkpoint, or the best is asked for and there is none.
        CheckpointError: all checkpoints of the run are damaged or not finite, or the best one is.
    """
    if not run.is_dir():
        raise RunFolderError(f"run folder {run} is not there: give the folder that a training wrote")
    folder = newest_whole(run / "checkpoints", not_finite)
    if folder is None:
        raise RunFolderError(f"run folder {run} holds no checkpoint: train until the first one is written")
    folder = _best(run, folder) if best else folder
    return folder, _weights(folder)


def _best(run: Path, newest: Path) -> Path:
    """Return the checkpoint that was the best, as the newest one tells."""
    step = Index.read(newest).progress.get("best", {}).get("step")
    if type(step) is not int:
        raise RunFolderError(f"run {run} knows no best checkpoint: its workload has no evaluation, or made none so far")
    if step == step_of(newest):
        return newest
    folder = final_path(newest.parent, step)
    if not folder.is_dir():
        raise RunFolderError(f"the best checkpoint of run {run}, {folder.name}, is gone: export without best")
    if problem := damage(folder) or not_finite(folder):
        raise CheckpointError(problem)
    return folder


def _weights(folder: Path) -> dict[str, Stored]:
    """Return the weights in a checkpoint by all their names, a moving average in place of what was trained.

    Raises:
        CheckpointError: the checkpoint's files do not hold them.
    """
    index = Index.read(folder)
    if problem := header_problem(folder, index):
        raise CheckpointError(problem)
    stored = {n.removeprefix(_PREFIX): entry for n, entry in index.tensors.items() if n.startswith(_PREFIX)}
    stored |= {n: index.tensors[_AVERAGE + n] for n in stored if _AVERAGE + n in index.tensors}
    named = stored | {alias: stored[name] for alias, name in index.aliases.items()}
    there, wanted = (sum(entry.spec.bytes for entry in part.values()) for part in (stored, named))
    if wanted > MOST_TIMES * there:
        raise CheckpointError(
            f"checkpoint {folder} gives {there} bytes of weights so many names that {wanted} bytes would be written: "
            f"more than {MOST_TIMES} times as many are not"
        )
    return without_loss(named)


def _export(folder: Path, stored: dict[str, Stored], out: Path) -> None:
    specs = {name: entry.spec for name, entry in stored.items()}
    write_tensors(out, specs, reader_of(folder, stored), {"format": "pt"})


def reader_of(folder: Path, stored: dict[str, Stored]) -> Callable[[str], Tensor]:
    """Return a function that reads a full weight of a checkpoint by its name."""
    # a checkpoint of thousands of workers has more files than a process may open at once
    opened = lru_cache(maxsize=64)(lambda name: safe_open(folder / name, "pt"))

    def read(name: str) -> Tensor:
        try:
            return _assemble(stored[name], opened)
        except SafetensorError as error:  # the files were checked a moment ago, so this is a new fault
            raise CheckpointError(f"checkpoint {folder} cannot be read any more: {error}") from None

    return read


def _assemble(stored: Stored, opened: Callable[[str], Any]) -> Tensor:
    """Assemble a full tensor from its chunks, which cover it exactly."""
    full = torch.empty(stored.spec.shape, dtype=stored.spec.dtype)
    for chunk in stored.chunks:
        Tile(chunk.offsets, chunk.sizes, start=chunk.offsets).view(full).copy_(opened(chunk.file).get_tensor(chunk.key))
    return full
