"""Arrays that are computed once and then memory-mapped, so that all workers of a machine share one copy in memory.

Files lie in the user's cache folder ($XDG_CACHE_HOME or ~/.cache, there `shardwise`) under a name derived from their
sources. They are written under a temporary name and renamed, so that an incomplete file is never read.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class LazyArray:
    """Array that is opened at its first use, and opened again by each process that receives it pickled."""

    def __init__(self, open_array: Callable[[], Array]) -> None:
        self._open = open_array
        self._array: Array | None = None

    @property
    def array(self) -> Array:
        """The array, read-only if it is memory-mapped."""
        if self._array is None:
            self._array = self._open()
        return self._array

    def __getstate__(self) -> dict[str, Any]:
        return {"_open": self._open, "_array": None}


def fingerprint(paths: Sequence[Path]) -> str:
    """Return a hash of the files' paths, sizes and modification times."""
    states = ((str(path), path.stat()) for path in paths)
    lines = [f"{name} {state.st_size} {state.st_mtime_ns}" for name, state in states]
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def cached(name: str, key: Sequence[object], build: Callable[[], Array]) -> Array:
    """Return the array from the cache, or build it and store it there.

    Args:
        name: start of the file's name.
        key: everything that the array depends on.
        build: makes the array. If the cache folder cannot be written, its result is used directly.
    """
    digest = hashlib.sha256(repr(tuple(key)).encode()).hexdigest()[:20]
    try:
        path = cache_folder() / f"{name}-{digest}.npy"
    except OSError:
        return build()
    with contextlib.suppress(OSError, ValueError):  # if the file is missing or incomplete, it is made below
        return _opened(path)
    array = build()
    with contextlib.suppress(OSError, ValueError):
        _write(path, array)
        return _opened(path)
    return array


def cache_folder() -> Path:
    """Return the folder of cached arrays, which may not exist yet. Raises OSError if the user has no home folder."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path("~/.cache").expanduser()) / "shardwise"
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "there is no home folder", "~/.cache/shardwise") from error


def check_writable() -> None:
    """Raise OSError if nothing can be written in the cache folder; its `filename` is that folder."""
    folder = cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(folder)) from error


def _opened(path: Path) -> Array:
    array: Array = np.load(path, mmap_mode="r", allow_pickle=False)
    return array


def _write(path: Path, array: Array) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem}-", suffix=".npy")
    try:
        with os.fdopen(handle, "wb") as file:
            np.save(file, array, allow_pickle=False)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise
