"""Read values of documents that were read from files: anything that is not of the expected type counts as missing."""

from __future__ import annotations

from collections.abc import Mapping
from math import isfinite
from typing import Any

Document = Mapping[str, Any]
"""JSON object."""


def lookup(document: Any, *path: str) -> Any:
    """Return the value at a path of keys. Returns None if it is not there."""
    for key in path:
        if not isinstance(document, dict):
            return None
        document = document.get(key)
    return document


def number(document: Any, *path: str) -> float | None:
    """Return the finite number at a path of keys. Returns None if there is none."""
    return as_number(lookup(document, *path))


def as_number(value: Any) -> float | None:
    """Return a value that is a finite number. Returns None if it is something else; a bool is no number."""
    kind = type(value)
    return value if (kind is float and isfinite(value)) or kind is int else None


def text(document: Any, *path: str) -> str:
    """Return the text at a path of keys; empty if there is none."""
    value = lookup(document, *path)
    return value if isinstance(value, str) else ""


def objects(document: Any, *path: str) -> list[Document]:
    """Return the JSON objects of the list at a path of keys; empty if there is no list."""
    value = lookup(document, *path)
    return [each for each in value if isinstance(each, dict)] if isinstance(value, list) else []


def texts(document: Any, *path: str) -> list[str]:
    """Return the texts of the list at a path of keys; empty if there is no list."""
    value = lookup(document, *path)
    return [each for each in value if isinstance(each, str)] if isinstance(value, list) else []


def numbers(document: Any, *path: str) -> list[float | None]:
    """Return the list at a path of keys with None for what is no finite number; empty if there is no list."""
    value = lookup(document, *path)
    return [as_number(each) for each in value] if isinstance(value, list) else []


def mapping(document: Any, *path: str) -> Document:
    """Return the JSON object at a path of keys; empty if there is none."""
    value = lookup(document, *path)
    return value if isinstance(value, dict) else {}


def amounts(document: Any, *path: str) -> dict[str, float]:
    """Return the finite numbers of the JSON object at a path of keys, by name."""
    found = {name: as_number(value) for name, value in mapping(document, *path).items()}
    return {name: value for name, value in found.items() if value is not None}
