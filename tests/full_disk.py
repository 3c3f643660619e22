"""A disk of one megabyte, for tests of what happens when it is full."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

DISK_BYTES = 1 << 20


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder where a small disk is mounted, nearly full; skipped where this user may not mount one.

    Most of it is taken by the file `filling`.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK_BYTES}", "tmpfs", str(folder)]
    done = subprocess.run(mount, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"a small disk cannot be mounted here: {done.stderr.strip()}")
    try:
        (folder / "filling").write_bytes(bytes(DISK_BYTES - (64 << 10)))
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)
