"""Folders of checkpoints on disk: which are complete, which are undamaged, and which are kept.

checkpoints/
    step-00000020/               complete: renamed into place after everything in it was on disk
        rank-00000.safetensors   tensors that worker 0 wrote
        index.json               location of each tensor, and the progress of the training
        manifest.json            bytes and CRC-32 of every other file; written last
    .step-00000030.partial/      being written, or left by a kill; never read
    .step-00000020.replaced/     earlier checkpoint of a step that is written again, until the new one is in place
    .step-00000010.deleted/      being deleted
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
from shardwise.run.checkpoint.checked_file import FileSum, write_file
from shardwise.run.jsonfile import entry, read_json, short, sync_folder

MANIFEST = "manifest.json"
MOST_BYTES = 1 << 30
"""Largest size of a JSON document of a checkpoint: ten million chunks, e.g. 4,096 workers with 2,000 tensors each."""

_COMPLETE = re.compile(r"step-([0-9]{8,})")
_HIDDEN = re.compile(r"\.(step-[0-9]{8,})\.(partial|replaced|deleted)")
_NAME = re.compile(r"[0-9A-Za-z][-.0-9A-Za-z]*")

logger = logging.getLogger(__name__)


def final_path(parent: Path, step: int) -> Path:
    """Return the path of the complete checkpoint after `step` optimizer steps."""
    return parent / f"step-{step:08d}"


def hidden_path(final: Path, state: str) -> Path:
    """Return the path of the hidden folder beside `final` in a state: `partial`, `replaced` or `deleted`."""
    return final.with_name(f".{final.name}.{state}")


def complete(parent: Path) -> list[Path]:
    """Return the complete checkpoints, newest first; one that is being replaced counts until its successor exists."""
    found: dict[int, Path] = {}
    for path in sorted(parent.iterdir(), reverse=True) if parent.is_dir() else []:
        if match := _COMPLETE.fullmatch(_final_name(path)):
            found.setdefault(int(match[1]), path)  # in reverse order "step-" precedes ".step-"
    return [found[step] for step in sorted(found, reverse=True)]


def _final_name(path: Path) -> str:
    """Return the name of a checkpoint without the marks of one that is being replaced."""
    hidden = _HIDDEN.fullmatch(path.name)
    return hidden[1] if hidden and hidden[2] == "replaced" else path.name


def newest_whole(parent: Path, wanted: Callable[[Path], str] = lambda _: "") -> Path | None:
    """Return the newest checkpoint that is undamaged and wanted. Returns None if there are no checkpoints.

    Each newer checkpoint that is skipped is reported in a warning. All bytes of the returned one are read.

    Args:
        parent: folder of the checkpoints.
        wanted: function that returns the reason to skip a checkpoint; empty: use it.

    Raises:
        CheckpointError: there are checkpoints, and none can be used. Starting anew unasked would lose the run.
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
    """Write the manifest of a checkpoint: the size and CRC-32 of each file, given in `sums` by file name."""
    files = _entries(sums)
    text = json.dumps({"files": files, "crc32": _own_sum(files)}, indent=1)
    write_file(folder / MANIFEST, iter([text.encode()]))


def damage(folder: Path, part: int = 0, parts: int = 1) -> str:
    """Return one line on the first damaged file of a checkpoint. Returns an empty string if all are intact.

    With `parts` several workers share the reading: only every `parts`-th file is read, from number `part` on. The sizes
    of all files are always checked.
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
    """Check that a file of a checkpoint exists and is regular, and return its bytes; a link could leave the folder.

    Raises:
        CheckpointError: the file is missing, or it is a link, a folder, a pipe or a device.
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
    """Read the manifest of a checkpoint: size and CRC-32 by file name; names with a path in them are refused.

    Raises:
        CheckpointError: the manifest is not as `write_manifest` wrote it.
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
    """Make the empty partial folder of a checkpoint, and delete hidden folders that earlier kills left behind."""
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
    """Rename the partial folder of a checkpoint into place, after its entries are on disk."""
    partial, replaced = hidden_path(final, "partial"), hidden_path(final, "replaced")
    sync_folder(partial)
    if final.exists():
        final.rename(replaced)
    partial.rename(final)
    sync_folder(final.parent)
    if replaced.exists():
        _remove(replaced)


def step_of(folder: Path) -> int:
    """Return the number of optimizer steps in the name of a complete checkpoint."""
    return int(_final_name(folder).removeprefix("step-"))


def prune(newest: Path, keep: int, protected: Container[int] = frozenset()) -> None:
    """Delete the checkpoints before `newest`, which has just been written, except the last `keep` - 1 of them.

    Checkpoints of the steps in `protected` are kept too, and do not count towards `keep`.
    """
    folders = complete(newest.parent)
    earlier = [folder for folder in folders[folders.index(newest) + 1 :] if step_of(folder) not in protected]
    for folder in earlier[keep - 1 :]:
        deleted = hidden_path(folder.with_name(_final_name(folder)), "deleted")
        try:
            folder.rename(deleted)  # atomic: a kill during the deletion must not leave half of it under its final name
        except OSError as error:
            logger.warning("checkpoint %s cannot be deleted: %s", folder, error)
        else:
            _remove(deleted)


def _remove(folder: Path) -> None:
    """Delete a hidden folder; if that fails, `begin` tries again before the next checkpoint."""
    with contextlib.suppress(OSError):
        _take_away(folder)


def _take_away(folder: Path) -> None:
    """Delete a folder; of a symbolic link that somebody put there, only the link itself. Raises OSError."""
    if folder.is_symlink():
        folder.unlink()
    else:
        shutil.rmtree(folder)
