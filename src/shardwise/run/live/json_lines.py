"""Reading of a file of JSON lines that another process appends to."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from stat import S_ISREG
from typing import IO, Any

from shardwise.run.jsonfile import parse_record

LONGEST_LINE = 1 << 20
"""Largest number of bytes in a line; a longer line is left out."""


class JsonLines:
    """Reader of the new lines of a file; damaged lines are left out, and so is a last line that is not complete.

    Args:
        path: path of the file, which may not exist yet.
        last_bytes: size of the end of the file to begin with; None: begin with its first line.
    """

    def __init__(self, path: Path, last_bytes: int | None = None) -> None:
        self._path, self._last_bytes = path, last_bytes
        self._file: tuple[int, int] | None = None
        self._offset = 0

    def replaced(self) -> bool:
        """Return whether the file is another one than before, or was cut: `new` then begins with it anew."""
        try:
            found = self._path.stat()
        except OSError:
            return False
        if self._file in (None, (found.st_dev, found.st_ino)) and found.st_size >= self._offset:
            return False
        self._file, self._offset = None, 0
        return True

    def new(self) -> Iterator[dict[str, Any]]:
        """Yield the objects of the lines since the last call. A file that cannot be read has none."""
        try:
            descriptor = os.open(self._path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_CLOEXEC", 0))
        except (OSError, ValueError):
            return
        with os.fdopen(descriptor, "rb") as file:
            found = os.fstat(descriptor)
            if not S_ISREG(found.st_mode):
                return
            if self._file is None:
                self._file = (found.st_dev, found.st_ino)
                self._offset = self._begin(file, found.st_size)
            yield from self._records(file)

    def _begin(self, file: IO[bytes], size: int) -> int:
        """Return the offset of the first line to read."""
        if self._last_bytes is None or size <= self._last_bytes:
            return 0
        file.seek(size - self._last_bytes)
        file.readline(LONGEST_LINE)
        return file.tell()

    def _records(self, file: IO[bytes]) -> Iterator[dict[str, Any]]:
        file.seek(self._offset)
        while line := file.readline(LONGEST_LINE):
            if not line.endswith(b"\n") and len(line) < LONGEST_LINE:
                return
            self._offset += len(line)
            record = parse_record(line)
            if record is not None:
                yield record
