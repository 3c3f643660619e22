"""JSON documents of a run, read with care and written so that they are there whole or not at all."""

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
    """Parse one JSON document. Raises ValueError for whatever is wrong with it, too deep a nesting included."""
    try:
        return json.loads(content)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def read_json(path: Path, limit_bytes: int, error_class: type[RequestError], what: str) -> Any:
    """Read a JSON document; see `read_regular` for the arguments.

    Raises:
        error_class: there is no such regular file, it is too large, or it is not JSON.
    """
    content = read_regular(path, limit_bytes, error_class, what)
    try:
        return parse_json(content)
    except ValueError as error:
        raise error_class(f"{what} {path}: is not JSON: {error}") from None


def entry(content: object, key: str, kind: type[_Kind]) -> _Kind:
    """Return the entry of a JSON object, which must be of a kind: a bool is no int. Raises ValueError."""
    if not isinstance(content, dict) or key not in content:
        raise ValueError(f"there is no {key!r}")
    value = content[key]
    if type(value) is not kind:
        raise ValueError(f"{key!r} is {short(value)} and not of type {kind.__name__}")
    return value


def short(value: object) -> str:
    """Spell a value of any length for a message of one line."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document so that it is there whole or not at all, also after a power cut; make its folder.

    Raises:
        OSError: the disk is full, say; what was there before still is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    replace_file(path, (json.dumps(content, indent=2) + "\n").encode())


def replace_file(path: Path, content: bytes) -> None:
    """Put a file in place of the one that is there, in one stroke, once it is on disk. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # a link that lies there would lead the writing elsewhere
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
    """Wait until the entries of a folder are on disk: a rename is only then sure to outlive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
