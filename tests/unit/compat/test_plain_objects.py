"""Plain values travel as bytes and come back equal; everything else is refused in one line, and no bytes run code."""

from __future__ import annotations

import json
import math
import pickle
import threading
from collections import OrderedDict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from shardwise.compat.horovod.objects import decode, encode
from shardwise.errors import RequestError

PLAIN: list[Any] = [
    *(None, True, 0, -(2**80), 1.5, math.inf, "", "é\n\0", b"", b"\x00\xff", 1 + 2j),
    *([], (), {}, set(), frozenset(), [1, [2, (3,)]], {"a": {1: (None,)}}, {(1, "x"): {2, 3}}),
    *(OrderedDict(b=1, a=2), torch.Size([2, 3]), torch.float32),
]


@pytest.mark.parametrize("value", PLAIN, ids=repr)
def test_comes_back_equal(value: Any) -> None:
    got = decode(encode(value))
    assert got == value
    assert type(got) is type(value)


def test_nan_comes_back() -> None:
    assert math.isnan(decode(encode(math.nan)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64], ids=str)
@pytest.mark.parametrize("shape", [(), (0,), (2, 3), (2, 0, 3)])
def test_tensors_come_back(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    tensor = torch.arange(6)[: math.prod(shape)].view(shape).to(dtype)
    first, second = decode(encode([tensor, tensor.t() if tensor.dim() == 2 else tensor]))
    assert first.dtype == dtype
    assert torch.equal(first, tensor)
    assert torch.equal(second, tensor.t() if tensor.dim() == 2 else tensor)


@pytest.mark.parametrize("array", [np.arange(6).reshape(2, 3), np.float32(1.5), np.zeros((0, 2)), np.array(3)])
def test_arrays_come_back(array: Any) -> None:
    got = decode(encode(array))
    assert got.dtype == array.dtype
    assert np.array_equal(got, array)


def test_the_state_of_an_optimizer_comes_back() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.Adam([parameter])
    parameter.sum().backward()  # type: ignore[no-untyped-call]
    optimizer.step()
    assert str(decode(encode(optimizer.state_dict()))) == str(optimizer.state_dict())


class Own:
    """A class of the script."""


Pair = namedtuple("Pair", "a b")


@pytest.mark.parametrize(
    "value",
    [Own(), Own, len, threading.Lock(), Pair(1, 2), np.array([Own()]), np.array(["x"]), torch.nn.Linear(1, 1)],
    ids=lambda value: type(value).__name__,
)
def test_refuses_what_is_not_plain(value: Any) -> None:
    with pytest.raises(RequestError, match="cannot be sent to other ranks: only plain values"):
        encode({"within": [value]})


def test_refuses_what_holds_itself() -> None:
    value: list[Any] = []
    value.append(value)
    with pytest.raises(RequestError, match="holds itself"):
        encode(value)


def test_refuses_tensors_without_data() -> None:
    for tensor in (torch.ones(2, device="meta"), torch.ones(2).to_sparse()):
        with pytest.raises(RequestError, match="sparse, quantized or without data"):
            encode(tensor)


def message(header: Any, data: bytes = b"") -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


@pytest.mark.parametrize(
    "data",
    [
        b"",
        pickle.dumps(Own),
        message(["call", "os.system", "true"]),
        message(["tensor", "float32", [2], 4], b"\0" * 4),
        message(["tensor", "float32", [-1], 4], b"\0" * 4),
        message(["tensor", "load", [1], 4], b"\0" * 4),
        message(["tensor", "float32", [1 << 60], 4 << 60]),
        message(["bytes", -1]),
        message(["bytes", 5], b"abc"),
        message(["array", "|O", [1], 8], b"\0" * 8),
        message(["dict", [["list"], 1]]),
        message(["dict", 1]),
        message([[]]),
        message([]),
    ],
)
def test_refuses_other_bytes(data: bytes) -> None:
    with pytest.raises(RequestError, match="no plain value"):
        decode(data)
