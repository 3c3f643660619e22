"""Frames carry tensors bit by bit, and bytes that are none are refused before memory is reserved."""

from __future__ import annotations

import random

import pytest
import torch

from shardwise.parallel.servers.frames import (
    DTYPES,
    HEADER,
    MAGIC,
    VERSION,
    BadFrame,
    Fill,
    Frame,
    Kind,
    parts_of_frame,
    read_frame,
)

LIMIT = 2**20


def written(frame: Frame) -> bytes:
    return b"".join(parts_of_frame(frame))


def filling(data: bytes) -> Fill:
    place = 0

    def fill(memory: memoryview) -> None:
        nonlocal place
        part = data[place : place + len(memory)]
        if len(part) < len(memory):
            raise EOFError
        memory[:] = part
        place += len(part)

    return fill


def read(data: bytes, limit: int = LIMIT) -> Frame:
    return read_frame(filling(data), limit)


def some() -> Frame:
    values = torch.arange(24).reshape(2, 3, 4)
    tensors = {f"t/{number}": values.to(dtype) for number, dtype in enumerate(DTYPES)}
    tensors |= {"number": torch.tensor(2.5), "none": torch.empty(0, 3), "turned": values.float().transpose(0, 2)}
    return Frame(Kind.PUSH, {"clock": 3, "weight": 0.5, "name": "é"}, tensors)


def test_a_frame_comes_back_bit_by_bit() -> None:
    frame, back = some(), read(written(some()))
    assert (back.kind, back.facts) == (frame.kind, frame.facts)
    assert list(back.tensors) == list(frame.tensors)
    for name, tensor in frame.tensors.items():
        assert back.tensors[name].dtype == tensor.dtype
        assert torch.equal(back.tensors[name], tensor), name


def test_places_of_dtypes_are_fixed() -> None:
    """They are part of version 1: logs and other versions of the program read them."""
    assert DTYPES[:5] == (torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int64)
    assert DTYPES[9] is torch.bool


def test_a_frame_larger_than_allowed_is_refused_at_its_head() -> None:
    head = HEADER.pack(MAGIC, VERSION, Kind.PUSH, 0, 2, 0, 2**50)
    with pytest.raises(BadFrame, match="allowed are 1000"):
        read(head, 1000)


@pytest.mark.parametrize(
    "head",
    [
        HEADER.pack(b"HTTP", VERSION, Kind.PUSH, 0, 0, 0, 0),
        HEADER.pack(MAGIC, VERSION + 1, Kind.PUSH, 0, 0, 0, 0),
        HEADER.pack(MAGIC, VERSION, Kind.PUSH, 7, 0, 0, 0),
        HEADER.pack(MAGIC, VERSION, 200, 0, 2, 0, 0) + b"{}",
        HEADER.pack(MAGIC, VERSION, Kind.PUSH, 0, 2, 0, 0) + b"[]",
        HEADER.pack(MAGIC, VERSION, Kind.PUSH, 0, 2, 0, 0) + b"{x",
        HEADER.pack(MAGIC, VERSION, Kind.PUSH, 0, 2, 0, 4) + b"{}0000",
    ],
)
def test_what_is_no_frame_is_refused(head: bytes) -> None:
    with pytest.raises(BadFrame):
        read(head)


def test_a_frame_that_is_cut_off_is_noticed() -> None:
    data = written(some())
    for end in range(0, len(data) - 1, 37):
        with pytest.raises(EOFError):
            read(data[:end])


def test_a_frame_with_wrong_bytes_is_read_or_refused_and_nothing_else() -> None:
    draw, data = random.Random(0), written(some())
    outcomes = set()
    for _ in range(500):
        wrong = bytearray(data)
        for _ in range(draw.randint(1, 4)):
            wrong[draw.randrange(min(len(wrong), 400))] = draw.randrange(256)
        try:
            read(bytes(wrong))
            outcomes.add("read")
        except (BadFrame, EOFError) as error:
            outcomes.add(type(error).__name__)
    assert outcomes >= {"BadFrame", "read"}
