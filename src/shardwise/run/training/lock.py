"""Lock of a run's folder: only one process at a time trains in it, and holds a lock on a file there until it ends.

The kernel releases the lock when its holder dies for any reason, so no stale lock is left behind. The file stays, with
the last holder's process id and host in it, and has no meaning on its own.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import socket
import stat
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from shardwise.errors import RunFolderError

LOCK = ".lock"
TRIES, PAUSE_SECONDS = 10, 0.005
"""Number of times that a lock is tried, and the pause between them: `is_locked` of others holds it for an instant."""

_HOLDER = re.compile(rb"([0-9]{1,10}) ([-.\w]{1,255})\n")

_held: dict[Path, int] = {}
"""Folder -> descriptor of the open file that holds its lock."""


def take_lock(folder: Path) -> None:
    """Take the lock of a run's folder until `release_lock` or the end of this process.

    If the file system has no locks, one line on standard error says so, and the run goes on without a lock.

    Raises:
        RunFolderError: another process, which the message names, has the lock; or the file cannot be made.
    """
    file = _open(folder)
    try:
        _lock_patiently(file)
    except BlockingIOError:
        holder = _holder(file)
        os.close(file)
        raise RunFolderError(
            f"{folder} is in use: {holder} trains in it; wait until it has ended, or use another --out"
        ) from None
    except OSError as error:
        os.close(file)
        sys.stderr.write(
            f"{folder} cannot be locked ({error.strerror}): see to it that no other run uses it meanwhile\n"
        )
        return
    _held[folder.resolve()] = file
    with contextlib.suppress(OSError):  # a full disk: the lock holds even without its holder's name
        os.ftruncate(file, 0)
        os.pwrite(file, f"{os.getpid()} {socket.gethostname()}\n".encode(), 0)


def is_locked(folder: Path) -> bool | None:
    """Return whether a process trains in a folder. Returns None if this cannot be told, for example without locks."""
    try:
        file = os.open(folder / LOCK, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
    except FileNotFoundError:
        return False
    except OSError:
        return None
    try:
        _lock(file, shared=True)
    except BlockingIOError:
        return True
    except OSError:
        return None
    finally:
        os.close(file)
    return False


def release_lock(folder: Path) -> None:
    """Release the lock of a folder; does nothing if this process does not hold it."""
    file = _held.pop(folder.resolve(), None)
    if file is not None:
        os.close(file)


@contextlib.contextmanager
def released(folder: Path | None) -> Iterator[None]:
    """Release the lock of a run's folder at the end of the block, for the next run in this process."""
    try:
        yield
    finally:
        if folder is not None:
            release_lock(folder)


def _open(folder: Path) -> int:
    flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        file = os.open(folder / LOCK, flags, 0o644)
    except OSError as error:
        raise RunFolderError(f"{folder / LOCK} cannot be made: {error.strerror}; use another --out") from None
    if not stat.S_ISREG(os.fstat(file).st_mode):
        os.close(file)
        raise RunFolderError(f"{folder / LOCK} is no regular file: remove it, or use another --out")
    return file


def _lock_patiently(file: int) -> None:
    """Lock a file in at most TRIES tries. Raises as `_lock`."""
    for _ in range(TRIES - 1):
        with contextlib.suppress(BlockingIOError):
            _lock(file)
            return
        time.sleep(PAUSE_SECONDS)
    _lock(file)


def _lock(file: int, *, shared: bool = False) -> None:
    """Lock a file without waiting. Raises BlockingIOError if another process holds it, OSError if locks do not work."""
    try:
        import fcntl
    except ImportError:
        raise OSError(errno.ENOSYS, "this system has no locks") from None
    fcntl.flock(file, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)


def _holder(file: int) -> str:
    """Describe the last process that wrote its name into the lock file: process id, and host if it is another."""
    found = _HOLDER.fullmatch(os.pread(file, 300, 0))
    if found is None:
        return "another process"
    host = found[2].decode()
    return f"process {int(found[1])}" + ("" if host == socket.gethostname() else f" on {host}")


def _let_go_in_child() -> None:
    """Close the descriptors that a forked child inherited, which would keep the lock beyond its holder's end."""
    for file in _held.values():
        with contextlib.suppress(OSError):
            os.close(file)
    _held.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_let_go_in_child)
