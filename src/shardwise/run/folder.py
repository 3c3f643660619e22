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

import contextlib
import json
import logging
import re
import shutil
import stat
import zlib
from collections.abc import Callable, Container, Mapping
from pathlib import Path

from shardwise.errors import CheckpointError
from shardwise.run.jsonfile import entry, read_json, short, sync_folder
from shardwise.run.tensorfile import FileSum, write_file

MANIFEST = "manifest.json"
MOST_BYTES = 1 << 30
"""Size of a JSON document of a checkpoint: ten million parts of tensors, say 4,096 workers with 2,000 tensors each."""

_COMPLETE = re.compile(r"step-([0-9]{8,})")
_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(partial|replaced|deleted)")
_NAME = re.compile(r"[0-9A-Za-z][-.0-9A-Za-z]*")

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
    files = _entries(sums)
    text = json.dumps({"files": files, "crc32": _own_sum(files)}, indent=1)
    write_file(folder / MANIFEST, iter([text.encode()]))


def damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """One line that names the first file that is not as it was written; empty where all are.

    With `parts` the work of reading is shared: only every `parts`-th file is read through, from number `part` on.
    """
    if not folder.is_dir():
        return f"checkpoint {folder} is not there"
    try:
        files = read_manifest(folder)
        for name, written in files.items():
            size = check_file(folder, name)
            if size != written.bytes:
                return f"checkpoint {folder} is damaged: {name} has {size} bytes instead of {written.bytes}"
        for name in sorted(files)[part::parts]:
            if FileSum.of(folder / name) != files[name]:
                return f"checkpoint {folder} is damaged: the checksum of {name} is wrong"
    except CheckpointError as error:
        return str(error)
    except OSError as error:
        return f"checkpoint {folder} cannot be read: {error}"
    return ""


def check_file(folder: Path, name: str) -> int:
    """Check that a file of a checkpoint is there and regular; a link could lead out of the folder. Returns its bytes.

    Raises:
        CheckpointError: it is missing, or it is a link, a folder, a pipe or a device.
    """
    try:
        found = (folder / name).lstat()
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint {folder} is damaged: {name} is missing") from None
    except OSError as error:
        raise CheckpointError(f"checkpoint {folder} cannot be read: {error}") from None
    if not stat.S_ISREG(found.st_mode):
        raise CheckpointError(f"checkpoint {folder} is damaged: {name} is no regular file")
    return found.st_size


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """Read what the files of a checkpoint must look like; their names are plain ones.

    Raises:
        CheckpointError: the manifest is not what `write_manifest` wrote.
    """
    check_file(folder, MANIFEST)
    content = read_json(folder / MANIFEST, MOST_BYTES, CheckpointError, "manifest")
    try:
        for name in (files := entry(content, "files", dict)):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{short(name)} is no plain name")
        sums = {name: FileSum(entry(file, "bytes", int), entry(file, "crc32", int)) for name, file in files.items()}
        if entry(content, "crc32", int) != _own_sum(_entries(sums)):
            raise ValueError("its own checksum is wrong")
        return sums
    except ValueError as error:
        raise CheckpointError(f"checkpoint {folder} is damaged: {MANIFEST} is not as it was written: {error}") from None


def _entries(sums: Mapping[str, FileSum]) -> dict[str, dict[str, int]]:
    return {name: {"bytes": written.bytes, "crc32": written.crc32} for name, written in sorted(sums.items())}


def _own_sum(files: Mapping[str, object]) -> int:
    return zlib.crc32(json.dumps(files, sort_keys=True).encode())


def begin(final: Path) -> Path:
    """Makes the empty partial folder of a checkpoint, and clears away what earlier kills left of our own."""
    parent = final.parent
    parent.mkdir(parents=True, exist_ok=True)
    for path in parent.iterdir():
        hidden = _HIDDEN.fullmatch(path.name)
        if hidden and not (hidden[2] == "replaced" and not (parent / hidden[1]).exists()):
            _take_away(path)
    partial = hidden_path(final, "partial")
    partial.mkdir()
    return partial


def publish(final: Path) -> None:
    """Renames the partial folder of a checkpoint into place once everything in it is on disk."""
    partial, replaced = hidden_path(final, "partial"), hidden_path(final, "replaced")
    sync_folder(partial)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
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
    with contextlib.suppress(OSError):
        _take_away(folder)


def _take_away(folder: Path) -> None:
    """Deletes a folder; of a link to one, which somebody put there, the link alone. Raises OSError."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
