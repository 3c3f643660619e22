"""Files with checksums: written and read block by block, without torch."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shardwise.launch import watch

_READ_BYTES = 1 << 22


@dataclass(frozen=True, slots=True)
class FileSum:
    """Size in bytes and CRC-32 of a file: detects accidental damage, not manipulation."""

    bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> FileSum:
        """Compute size and CRC-32 of a file, which is read once."""
        size = crc = 0
        with path.open("rb") as file:
            while block := file.read(_READ_BYTES):
                size += len(block)
                crc = zlib.crc32(block, crc)
                watch.alive()
        return cls(size, crc)


def write_file(path: Path, blocks: Iterator[memoryview | bytes]) -> FileSum:
    """Write blocks to a new file, wait until they are on disk, and return its size and CRC-32."""
    size = crc = 0
    with path.open("xb") as file:
        for block in blocks:
            file.write(block)
            watch.alive()
            size += len(block)
            crc = zlib.crc32(block, crc)
        file.flush()
        os.fsync(file.fileno())
    return FileSum(size, crc)
