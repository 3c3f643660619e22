"""Safe reading of TOML files that a user names: no content can hang or crash the reader."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

from shardwise.errors import RequestError
from shardwise.files import read_regular_text
from shardwise.units import LARGEST_WHOLE

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

DEEPEST = 16
"""Largest nesting depth of tables and arrays."""

_PART = r"""(?:[A-Za-z0-9_-]+|"[^"\n]*"|'[^'\n]*')"""
_LONG_KEY = re.compile(rf"(?<![A-Za-z0-9_-]){_PART}(?:[ \t]*\.[ \t]*{_PART}){{{DEEPEST},}}")
"""Dotted key with more than DEEPEST parts: the parser's time grows with the cube of their number."""


def read_toml(path: Path | str, limit_bytes: int, error_class: type[RequestError], what: str) -> dict[str, Any]:
    """Read a TOML file whose whole numbers have at most 64 bits, and whose tables are at most 16 deep.

    Args:
        path: path of the file.
        limit_bytes: largest size of the file.
        error_class: class of the error to raise.
        what: kind of file for messages, such as `plan file`; may be empty.

    Raises:
        error_class: the file cannot be read, is not TOML, or exceeds the limits above.
    """
    text = read_regular_text(path, limit_bytes, error_class, what)
    label = f"{what} {path}" if what else str(path)
    try:
        _check_keys(text)
        content: dict[str, Any] = tomllib.loads(text)
        _check_values(content)
    except RecursionError:
        raise error_class(f"{label}: is nested more than {DEEPEST} deep") from None
    except ValueError as error:  # TOMLDecodeError is a subclass; Python raises ValueError for numbers of > 4,300 digits
        raise error_class(f"{label}: is not TOML: {str(error)[:300]}") from None
    return content


def _check_keys(text: str) -> None:
    found = _LONG_KEY.search(text)
    if found:
        line = text.count("\n", 0, found.start()) + 1
        raise ValueError(f"a key of more than {DEEPEST} parts in line {line}")


def _check_values(content: dict[str, Any]) -> None:
    """Check the size of all whole numbers and the nesting depth. Raises ValueError."""
    level: list[Any] = [content]
    for _ in range(DEEPEST):
        containers = [each for each in level if isinstance(each, dict | list)]
        level = [value for each in containers for value in (each.values() if isinstance(each, dict) else each)]
        for value in level:
            _check_number(value)
    if any(isinstance(value, dict | list) for value in level):
        raise ValueError(f"nested more than {DEEPEST} deep")


def _check_number(value: Any) -> None:
    if isinstance(value, int) and abs(value) > LARGEST_WHOLE:
        raise ValueError("a whole number of more than 64 bits")
