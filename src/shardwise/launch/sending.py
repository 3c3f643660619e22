"""Writing of what workers are sent: by cloudpickle, to our own processes only."""

from __future__ import annotations

from dataclasses import fields, is_dataclass
from typing import Any

from shardwise.errors import RequestError


def written(value: Any) -> bytes:
    """Return a value as bytes for worker processes.

    Raises:
        RequestError: it cannot be sent; the message names the innermost field that is at fault.
    """
    import cloudpickle

    try:
        data: bytes = cloudpickle.dumps(value)
    except Exception as error:
        name, reason = _culprit(value, "what workers are to run", error)
        raise RequestError(
            f"{name} cannot be sent to worker processes: {type(reason).__name__}: {reason}: give the workload by name, "
            "path/to/file.py:function or package.module:function, so that each worker builds its own"
        ) from error
    return data


def _culprit(value: Any, name: str, error: Exception) -> tuple[str, Exception]:
    """Return the name of the innermost part of `value` that cannot be sent, and its error."""
    import cloudpickle

    parts: list[tuple[str, Any]] = []
    if is_dataclass(value):
        parts = [(field.name, getattr(value, field.name)) for field in fields(value)]
    elif isinstance(value, tuple | list):
        parts = [(name, each) for each in value]
    for part, each in parts:
        try:
            cloudpickle.dumps(each)
        except Exception as inner:
            return _culprit(each, part, inner)
    return name, error
