"""Plain values as bytes, without pickle: bytes of another rank can hold values, and never run code.

    8 bytes: length of the header | header: JSON, one tagged value | bytes of tensors and arrays, one after another

Values are None, bool, int, float, complex, str, bytes, list, tuple, set, frozenset, dict, OrderedDict, torch tensors,
sizes and dtypes, and numpy arrays and scalars of numbers. Anything else is refused: an object of another class would
have to be rebuilt by its code.
"""

from __future__ import annotations

import json
import math
from collections import OrderedDict
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from shardwise.errors import RequestError

LENGTH_BYTES = 8
"""Size of the length that the bytes begin with."""

_SEQUENCES: dict[type, str] = {list: "list", tuple: "tuple", set: "set", frozenset: "frozenset", torch.Size: "size"}
_MAPPINGS: dict[type, str] = {dict: "dict", OrderedDict: "ordered"}
_MAKERS: dict[str, Callable[[Any], Any]] = {name: kind for kind, name in (_SEQUENCES | _MAPPINGS).items()}
_DTYPES = {str(value).removeprefix("torch."): value for value in vars(torch).values() if type(value) is torch.dtype}
_NUMBERS = "biufc"
"""Kinds of numpy dtypes that hold numbers."""


def encode(value: Any) -> bytes:
    """Return a plain value as bytes.

    Raises:
        RequestError: the value, or one within it, is not plain.
    """
    blobs: list[bytes] = []
    try:
        header = json.dumps(_tagged(value, blobs)).encode()
    except RecursionError:
        raise RequestError("a value that is nested so deeply, or holds itself, cannot be sent to other ranks") from None
    return b"".join([len(header).to_bytes(LENGTH_BYTES, "little"), header, *blobs])


def decode(data: bytes) -> Any:
    """Return the value of bytes that `encode` made.

    Raises:
        RequestError: the bytes are something else.
    """
    try:
        end = LENGTH_BYTES + int.from_bytes(data[:LENGTH_BYTES], "little")
        return _Reader(data, end).value(json.loads(data[LENGTH_BYTES:end]))
    except (ValueError, TypeError, KeyError, IndexError, RecursionError, RuntimeError) as error:
        raise RequestError(f"what another rank sent is no plain value: {type(error).__name__}: {error}") from None


def _tagged(value: Any, blobs: list[bytes]) -> Any:
    """Return a value as JSON, with the bytes of its tensors in `blobs`; a list in it is [tag, ...]."""
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind in _SEQUENCES:
        return [_SEQUENCES[kind], *(_tagged(each, blobs) for each in value)]
    if kind in _MAPPINGS:
        return [_MAPPINGS[kind], *([_tagged(key, blobs), _tagged(each, blobs)] for key, each in value.items())]
    if kind is bytes:
        return ["bytes", _added(value, blobs)]
    if kind is complex:
        return ["complex", value.real, value.imag]
    if kind is torch.dtype:
        return ["dtype", str(value).removeprefix("torch.")]
    if isinstance(value, Tensor):
        return _tagged_tensor(value, blobs)
    if isinstance(value, np.ndarray | np.generic) and value.dtype.kind in _NUMBERS:
        name = "array" if isinstance(value, np.ndarray) else "scalar"
        return [name, value.dtype.str, list(value.shape), _added(value.tobytes(), blobs)]
    raise RequestError(
        f"a value of type {kind.__module__}.{kind.__qualname__} cannot be sent to other ranks: only plain values, "
        "tensors and arrays of numbers travel, as nothing is unpickled; send its state_dict or its fields"
    )


def _tagged_tensor(tensor: Tensor, blobs: list[bytes]) -> list[Any]:
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        raise RequestError(
            "a tensor that is sparse, quantized or without data cannot be sent to other ranks as an object"
        )
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    data = plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""
    return ["tensor", str(tensor.dtype).removeprefix("torch."), list(tensor.shape), _added(data, blobs)]


def _added(data: bytes, blobs: list[bytes]) -> int:
    blobs.append(data)
    return len(data)


class _Reader:
    """Reader of tagged values, which takes the bytes of tensors from `data` in their order."""

    def __init__(self, data: bytes, start: int) -> None:
        self._data, self._at = data, start

    def value(self, tagged: Any) -> Any:
        """Return the value of JSON that `_tagged` made. Raises ValueError and others if it is something else."""
        if not isinstance(tagged, list):
            return tagged
        tag, *parts = tagged
        if tag in ("dict", "ordered"):
            return _MAKERS[tag]((self.value(key), self.value(each)) for key, each in parts)
        if tag in _MAKERS:
            return _MAKERS[tag](self.value(each) for each in parts)
        if tag == "bytes":
            return self._bytes(parts[0])
        if tag == "complex":
            return complex(*parts)
        if tag == "dtype":
            return _DTYPES[parts[0]]
        if tag == "tensor":
            return self._tensor(*parts)
        if tag in ("array", "scalar"):
            array = self._array(*parts)
            return array if tag == "array" else array[()]
        raise ValueError(f"unknown tag {tag!r}")

    def _bytes(self, size: int) -> bytes:
        end = self._at + size
        if size < 0 or end > len(self._data):
            raise ValueError(f"{size} bytes where there are {len(self._data) - self._at}")
        taken, self._at = self._data[self._at : end], end
        return taken

    def _tensor(self, name: str, shape: list[int], size: int) -> Tensor:
        dtype = _DTYPES[name]
        data = bytearray(self._bytes(size))
        if min(shape, default=0) < 0 or math.prod(shape) * dtype.itemsize != size:
            raise ValueError(f"{size} bytes for a tensor of shape {shape}")
        return (torch.frombuffer(data, dtype=dtype) if data else torch.empty(0, dtype=dtype)).view(shape)

    def _array(self, name: str, shape: list[int], size: int) -> Any:
        dtype = np.dtype(name)
        if dtype.kind not in _NUMBERS:
            raise ValueError(f"an array of dtype {name}")
        return np.frombuffer(self._bytes(size), dtype=dtype).reshape(shape).copy()
