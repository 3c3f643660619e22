"""Optimizer state that is not a tensor, as JSON: numbers, strings, None, and lists, tuples and dicts of these.

Tensors inside are saved as tensors and referred to by their path: `Q[1]` is the second entry of the list `Q`.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from shardwise.errors import CheckpointError

_KINDS: dict[str, Any] = {"list": list, "tuple": tuple, "dict": dict, "ordered": OrderedDict}
_PLAIN = (bool, int, float, str, type(None))


class Unsaved(Exception):
    """A value that a checkpoint cannot hold; the message is its path and type."""


def encode(value: Any, path: str) -> Any:
    """Return a value of an optimizer's state in a form that JSON can hold. Raises Unsaved."""
    if type(value) in _PLAIN:
        return value
    if isinstance(value, Tensor):
        return {"tensor": path}
    kind = next((name for name, known in _KINDS.items() if type(value) is known), None)
    if kind is None:
        raise Unsaved(f"{path} of type {type(value).__name__}")
    if not isinstance(value, dict):
        return {kind: [encode(entry, f"{path}[{number}]") for number, entry in enumerate(value)]}
    odd = next((key for key in value if type(key) not in _PLAIN), None)
    if odd is not None:
        raise Unsaved(f"{path} with a key of type {type(odd).__name__}")
    return {kind: [[key, encode(entry, f"{path}[{number}]")] for number, (key, entry) in enumerate(value.items())]}


def tensors_in(value: Any, path: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the path and value of every tensor in a value that `encode` accepts."""
    if isinstance(value, Tensor):
        yield path, value
    elif isinstance(value, (dict, list, tuple)):
        for number, entry in enumerate(value.values() if isinstance(value, dict) else value):
            yield from tensors_in(entry, f"{path}[{number}]")


def decode(saved: Any, tensors: Mapping[str, Tensor]) -> Any:
    """Return the value that `encode` was given, with its tensors by path.

    Raises:
        CheckpointError: `saved` is no result of `encode`, or a tensor is missing.
    """
    if type(saved) in _PLAIN:
        return saved
    try:
        ((kind, content),) = saved.items()
        if kind == "tensor":
            return tensors[content]
        if kind in ("list", "tuple"):
            return _KINDS[kind](decode(entry, tensors) for entry in content)
        return _KINDS[kind]((key, decode(entry, tensors)) for key, entry in content)
    except (AttributeError, TypeError, ValueError, KeyError):
        raise CheckpointError(f"the checkpoint has {str(saved)[:60]!r} in the state of the optimizer") from None
