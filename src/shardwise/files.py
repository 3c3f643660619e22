"""Safe reading of files that a user names: only regular files, and only up to a limit of bytes.

A FIFO waits for a writer forever, `/dev/zero` never ends, and opening a socket or a device may have any effect.
All functions raise the error class that the caller gives, with one line: the file, the fault, the remedy.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path

from shardwise.errors import RequestError
from shardwise.units import format_bytes

_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe (FIFO)"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)
_NO_WAITING = getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOCTTY", 0) | getattr(os, "O_CLOEXEC", 0)


def read_regular(
    path: Path | str, limit_bytes: int, error_class: type[RequestError] = RequestError, what: str = ""
) -> bytes:
    """Read a whole regular file of at most `limit_bytes` bytes.

    Args:
        path: path of the file; links are followed.
        limit_bytes: largest size; a larger file is refused before any of it is read.
        error_class: class of the error to raise.
        what: kind of file for messages, such as `plan file`; may be empty.

    Raises:
        error_class: the file does not exist, is not regular, is too large, or cannot be read.
    """
    descriptor = _opened(path, error_class, what)
    try:
        _check_kind(os.fstat(descriptor), path, error_class, what)
        _check_size(os.fstat(descriptor).st_size, limit_bytes, path, error_class, what)
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            content = file.read(limit_bytes + 1)  # some files, in /proc for example, hold more than `st_size` bytes
    except OSError as error:
        raise error_class(f"{_named(what, path)}: cannot be read: {error.strerror}") from None
    finally:
        os.close(descriptor)
    _check_size(len(content), limit_bytes, path, error_class, what)
    return content


def read_regular_text(
    path: Path | str, limit_bytes: int, error_class: type[RequestError] = RequestError, what: str = ""
) -> str:
    """Read a whole regular file as UTF-8 text; see `read_regular` for arguments and errors."""
    try:
        return read_regular(path, limit_bytes, error_class, what).decode("utf-8")
    except UnicodeDecodeError as error:
        raise error_class(f"{_named(what, path)}: is not text in UTF-8: byte {error.start} is wrong") from None


def check_regular(
    path: Path | str,
    error_class: type[RequestError] = RequestError,
    what: str = "",
    limit_bytes: int | None = None,
) -> int:
    """Check that a file which a library will open by name exists, is regular and not too large; return its bytes.

    Raises:
        error_class: see `read_regular`.
    """
    try:
        found = os.stat(path)
    except FileNotFoundError:
        raise error_class(f"{_named(what, path)}: there is no such file") from None
    except (OSError, ValueError) as error:
        raise error_class(f"{_named(what, path)}: cannot be read: {_reason(error)}") from None
    _check_kind(found, path, error_class, what)
    if limit_bytes is not None:
        _check_size(found.st_size, limit_bytes, path, error_class, what)
    return found.st_size


def _opened(path: Path | str, error_class: type[RequestError], what: str) -> int:
    """Open a file for reading and return its descriptor; a FIFO without a writer opens without waiting."""
    try:
        return os.open(path, os.O_RDONLY | _NO_WAITING)
    except FileNotFoundError:
        raise error_class(f"{_named(what, path)}: there is no such file") from None
    except (OSError, ValueError) as error:  # ValueError: the name has a NUL byte
        _check_special(path, error_class, what)
        raise error_class(f"{_named(what, path)}: cannot be read: {_reason(error)}") from None


def _check_special(path: Path | str, error_class: type[RequestError], what: str) -> None:
    """Raise the error that names the kind of a file which cannot even be opened, such as a socket."""
    try:
        found = os.stat(path)
    except (OSError, ValueError):
        return
    _check_kind(found, path, error_class, what)


def _check_kind(found: os.stat_result, path: Path | str, error_class: type[RequestError], what: str) -> None:
    if not stat.S_ISREG(found.st_mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(found.st_mode)), "no regular file")
        raise error_class(f"{_named(what, path)}: is {kind}: give a regular file")


def _check_size(size: int, limit: int, path: Path | str, error_class: type[RequestError], what: str) -> None:
    if size > limit:
        raise error_class(f"{_named(what, path)}: is larger than {format_bytes(limit)}, the most that is read")


def _named(what: str, path: Path | str) -> str:
    return f"{what} {path}" if what else str(path)


def _reason(error: Exception) -> str:
    return str(getattr(error, "strerror", None) or error)
