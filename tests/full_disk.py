"""A disk of one megabyte, for tests of what happens when it is full."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

DISK_BYTES = 1 << 20

DETACH = 2
"""MNT_DETACH of umount2(2)."""


@pytest.fixture
def full_disk(tmp_path: Path) -> Iterator[Path]:
    """The folder where a small disk is mounted, nearly full; skipped where this user may not mount one.

    Most of it is taken by the file `filling`.
    """
    folder = tmp_path / "disk"
    folder.mkdir()
    error = mounted(folder)
    if error:
        pytest.skip(f"a small disk cannot be mounted here: {error}")
    try:
        (folder / "filling").write_bytes(bytes(DISK_BYTES - (64 << 10)))
        yield folder
    finally:
        assert ctypes.CDLL(None, use_errno=True).umount2(bytes(folder), DETACH) == 0, os.strerror(ctypes.get_errno())


def mounted(folder: Path) -> str:
    """Mount an empty disk at `folder` without a process of its own; return the system's error, or nothing."""
    mount = getattr(ctypes.CDLL(None, use_errno=True), "mount", None)
    if mount is None:
        return "this system has no mount(2)"
    done = mount(b"tmpfs", bytes(folder), b"tmpfs", ctypes.c_ulong(0), b"size=%d" % DISK_BYTES)
    return os.strerror(ctypes.get_errno()) if done else ""
