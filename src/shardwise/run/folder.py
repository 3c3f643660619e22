"""Checkpoints on disk: which are complete, which are whole, which stay.

checkpoints/
step-00000020/               complete: renamed into place after everything in it was on disk
rank-00000.safetensors   what worker 0 wrote
index.json               which tensor lies where, and how far the training was
manifest.json            bytes and CRC-32 of every other file; written last
.step-00000030.partial/      being written, or left by a kill; never read
.step-00000020.replaced/     the earlier one of a step that is written again, until the new one is in place
.step-00000010.deleted/      on its way out
"""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from shardwise.errors import CheckpointError
from shardwise.run.tensorfile import FileSum, write_file

MANIFEST = "manifest.json"
_COMPLETE = re.compile(r"step-(\d{8,})")
_HIDDEN = re.compile(r"\.(step-\d{8,})\.(partial|replaced|deleted)")

logger = logging.getLogger(__name__)


def final_path(parent: Path, step: int) -> Path:
    """Where the checkpoint after `step` optimizer steps is once it is complete."""
    return parent / f"step-{step:08d}"


def hidden_path(final: Path, state: str) -> Path:
    """The dot-named folder beside `final`: `partial`, `replaced` or `deleted`."""
    return final.with_name(f".{final.name}.{state}")


def complete(parent: Path) -> list[Path]:
    """Complete checkpoints, the newest first. One that is just being replaced counts until its successor is there."""
    found: dict[int, Path] = {}
    for path in sorted(parent.iterdir(), reverse=True) if parent.is_dir() else []:
        if match := _COMPLETE.fullmatch(_final_name(path)):
            found.setdefault(int(match[1]), path)  # "step-" sorts after ".step-", so it comes first here
    return [found[step] for step in sorted(found, reverse=True)]


def _final_name(path: Path) -> str:
    """The name that a checkpoint has when it is not being replaced."""
    hidden = _HIDDEN.fullmatch(path.name)
    return hidden[1] if hidden and hidden[2] == "replaced" else path.name


def newest_whole(parent: Path, wanted: Callable[[Path], str] = lambda _: "") -> Path | None:
    """The newest checkpoint whose files are as they were written; None where there is none at all.

    Every damaged one on the way is said in a warning, and every one of which `wanted` says why not. Reads all bytes of
    the one that it returns.

    Raises:
        CheckpointError: there are checkpoints, and none can be used: to start anew unasked would lose the run.
    """
    problems = []
    for folder in complete(parent):
        problem = damage(folder) or wanted(folder)
        if not problem:
            return folder
        problems.append(problem)
        logger.warning("%s; trying the one before", problem)
    if problems:
        raise CheckpointError(f"no checkpoint in {parent} can be used: {problems[0]}; train into another folder")
    return None


def write_manifest(folder: Path, sums: Mapping[str, FileSum]) -> None:
    """Writes what the files of a checkpoint must look like; `sums` by file name."""
    files = {name: {"bytes": entry.bytes, "crc32": entry.crc32} for name, entry in sorted(sums.items())}
    text = json.dumps({"files": files, "crc32": _own_sum(files)}, indent=1)
    write_file(folder / MANIFEST, iter([text.encode()]))


def damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """One line that names the first file that is not as it was written; empty where all are.

    With `parts` the work of reading is shared: only every `parts`-th file is read through, from number `part` on.
    """
    if not folder.is_dir():
        return f"checkpoint {folder} is not there"
    try:
        files = _manifest(folder)
        for name, entry in files.items():
            size = (folder / name).stat().st_size
            if size != entry.bytes:
                return f"checkpoint {folder} is damaged: {name} has {size} bytes instead of {entry.bytes}"
        for name in sorted(files)[part::parts]:
            if FileSum.of(folder / name) != files[name]:
                return f"checkpoint {folder} is damaged: the checksum of {name} is wrong"
    except FileNotFoundError as error:
        return f"checkpoint {folder} is damaged: {Path(error.filename).name} is missing"
    except OSError as error:
        return f"checkpoint {folder} cannot be read: {error}"
    except ValueError:
        return f"checkpoint {folder} is damaged: {MANIFEST} is not as it was written"
    return ""


def _manifest(folder: Path) -> dict[str, FileSum]:
    """ValueError where the manifest is not what `write_manifest` wrote."""
    try:
        content = json.loads((folder / MANIFEST).read_bytes())
        files = content["files"]
        if content["crc32"] != _own_sum(files):
            raise ValueError("checksum")
        return {str(name): FileSum(entry["bytes"], entry["crc32"]) for name, entry in files.items()}
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(str(error)) from error


def _own_sum(files: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def begin(final: Path) -> Path:
    """Makes the empty partial folder of a checkpoint, and clears away what earlier kills left of our own."""
    parent = final.parent
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.iterdir():
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden and not (hidden[2] == "replaced" and not (parent / hidden[1]).exists()):
            shutil.rmtree(path)
    partial = hidden_path(final, "partial")
    partial.mkdir()
    return partial


def publish(final: Path) -> None:
    """Renames the partial folder of a checkpoint into place once everything in it is on disk."""
    partial, replaced = hidden_path(final, "partial"), hidden_path(final, "replaced")
    _sync_folder(partial)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    _sync_folder(final.parent)
    if replaced.exists():
        _remove(replaced)


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps that the name of a complete checkpoint says."""
    return int(_final_name(folder).removeprefix("step-"))


def prune(newest: Path, keep: int, protected: Container[int] = frozenset()) -> None:
    """Delete the checkpoints before `newest`, which has just been written, but for the last `keep` - 1 of them.

    Those after the steps in `protected` stay, too, and are not counted among the `keep`.
    """
    folders = complete(newest.parent)
    earlier = [folder for folder in folders[folders.index(newest) + 1 :] if step_of(folder) not in protected]
    for folder in earlier[keep - 1 :]:
        deleted = hidden_path(folder.with_name(_final_name(folder)), "deleted")
        try:
            folder.rename(deleted)  # in one stroke: a kill while its files go must not leave half of it under its name
        except OSError as error:
            logger.warning("checkpoint %s cannot be deleted: %s", folder, error)
        else:
            _remove(deleted)


def _remove(folder: Path) -> None:
    """Deletes one of our folders; what cannot be deleted now is tried again before the next checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    """Waits until the entries of a folder are on disk: a rename is only then sure to outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
