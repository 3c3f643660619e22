"""JSON documents of a run: safe reading, and atomic writing."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from shardwise.errors import RequestError
from shardwise.files import read_regular

_Kind = TypeVar("_Kind")


def parse_json(content: bytes | str) -> Any:
    """Parse one JSON document. Raises ValueError for any fault, including too deep nesting."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_record(line: bytes) -> dict[str, Any] | None:
    """Parse one line of a file with a JSON object on each line. Returns None if it is damaged, or is no object."""
    try:
        record = parse_json(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) else None


def read_json(path: Path, limit_bytes: int, error_class: type[RequestError], what: str) -> Any:
    """Read a JSON document; see `read_regular` for the arguments.

    Raises:
        error_class: the file does not exist, is not regular, is too large, or is not JSON.
    """
    content = read_regular(path, limit_bytes, error_class, what)
    try:
        return parse_json(content)
    except ValueError as error:
        raise error_class(f"{what} {path}: is not JSON: {error}") from None


def entry(content: object, key: str, kind: type[_Kind]) -> _Kind:
    """Return an entry of a JSON object, which must be exactly of type `kind`: a bool is no int. Raises ValueError."""
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"there is no {key!r}")
    value = content[key]
    if type(value) is not kind:
        raise ValueError(f"{key!r} is {short(value)} and not of type {kind.__name__}")
    return value


def short(value: object) -> str:
    """Return the repr of a value for a message, shortened to 60 characters."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON document atomically, even against a power cut; make its folder if needed.

    Raises:
        OSError: it cannot be written, for example because the disk is full. The earlier file is then unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Write a file to disk, and replace the earlier file by it atomically. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a symbolic link of this name would redirect the write
    try:
        with partial.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink(missing_ok=True)
        raise
    sync_folder(path.parent)


def sync_folder(folder: Path) -> None:
    """Wait until the entries of a folder are on disk; a rename survives a power cut only after that."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
