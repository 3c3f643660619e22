"""Frames of the protocol between workers and parameter servers, and of a server's log: no pickle, all sizes checked.

    offset  bytes  field
    0       4      magic, `SWPS`
    4       1      version of the protocol
    5       1      kind, see `Kind`
    6       2      zero
    8       4      bytes of the facts, a JSON object
    12      4      bytes of the table of tensors
    16      8      bytes of the values of all tensors

Facts, table and values follow. An entry of the table is the length of a tensor's name (2 bytes), its dtype (1, an index
into DTYPES), its number of dimensions (1), its name, and its dimensions (8 bytes each). The values are the raw bytes of
the tensors in the order of the table. All numbers are little-endian.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

HEADER = struct.Struct("<4sBBHIIQ")
MAGIC, VERSION = b"SWPS", 1
ENTRY = struct.Struct("<HBB")

DTYPES = (
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.bool,
    torch.complex64,
    torch.complex128,
)
"""Dtypes that a frame can carry; a place in this tuple never changes its meaning within a version."""

MOST_DIMENSIONS = 64
"""Largest number of dimensions of a tensor in torch."""

Fill = Callable[[memoryview], None]
"""Reader of bytes: fills all of the memory that it is given. Raises EOFError if there are fewer."""


class Kind(IntEnum):
    """Kinds of frames: the question of a worker and the server's answer, or an event in a server's log."""

    CHALLENGE = 1
    HELLO = 2
    WELCOME = 3
    PUSH = 4
    APPLY = 5
    READ = 6
    WRITE = 7
    ENTER = 8
    DROP = 9
    DONE = 10
    WRONG = 11
    STATE = 12
    WAIT = 13
    REGROUP = 14


class BadFrame(Exception):
    """Bytes that are no frame of this protocol, or one that is larger than allowed."""


@dataclass(frozen=True, slots=True)
class Frame:
    """One message.

    Attributes:
        kind: kind of the message.
        facts: its values that are no tensors, JSON-able.
        tensors: its tensors by name.
    """

    kind: Kind
    facts: dict[str, Any] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)

    @property
    def data_bytes(self) -> int:
        """Return the bytes of the values of all tensors."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self.tensors.values())


def parts_of_frame(frame: Frame) -> Iterator[memoryview]:
    """Yield the bytes of a frame: its head in one part, then the values of each tensor, copied only off a device."""
    facts, table = json.dumps(frame.facts).encode(), _table(frame.tensors)
    head = HEADER.pack(MAGIC, VERSION, frame.kind, 0, len(facts), len(table), frame.data_bytes)
    yield memoryview(head + facts + table)
    for tensor in frame.tensors.values():
        if tensor.numel():
            yield _bytes_of(tensor.detach().cpu().contiguous())


def read_frame(fill: Fill, limit: int) -> Frame:
    """Read one frame of at most `limit` bytes.

    Raises:
        BadFrame: the bytes are no frame, or a larger one; nothing is allocated for it then.
        EOFError: the bytes end within the frame, or before it.
    """
    head = bytearray(HEADER.size)
    fill(memoryview(head))
    magic, version, kind, zero, facts_bytes, table_bytes, data_bytes = HEADER.unpack(head)
    if magic != MAGIC or zero or version != VERSION:
        raise BadFrame(f"no frame of version {VERSION}")
    if facts_bytes + table_bytes + data_bytes > limit:
        raise BadFrame(f"a frame of {facts_bytes + table_bytes + data_bytes} bytes, allowed are {limit}")
    content = bytearray(facts_bytes + table_bytes)
    fill(memoryview(content))
    facts = _facts(bytes(content[:facts_bytes]))
    described = _described(bytes(content[facts_bytes:]))
    if sum(math.prod(shape) * dtype.itemsize for dtype, shape in described.values()) != data_bytes:
        raise BadFrame("the table of tensors does not add up to their bytes")
    tensors = {name: torch.empty(shape, dtype=dtype) for name, (dtype, shape) in described.items()}
    for tensor in tensors.values():
        if tensor.numel():
            fill(_bytes_of(tensor))
    return Frame(_kind(kind), facts, tensors)


def send_frame(line: socket.socket, frame: Frame) -> None:
    """Send a frame. Raises OSError if the connection breaks."""
    for part in parts_of_frame(frame):
        line.sendall(part)


def receive_frame(line: socket.socket, limit: int) -> Frame:
    """Receive one frame of at most `limit` bytes.

    Raises:
        BadFrame, EOFError: see `read_frame`.
        OSError: the connection breaks.
    """

    def fill(memory: memoryview) -> None:
        while memory:
            count = line.recv_into(memory)
            if not count:
                raise EOFError("the connection was closed")
            memory = memory[count:]

    return read_frame(fill, limit)


def _bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous tensor on the CPU that has elements."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _table(tensors: Mapping[str, Tensor]) -> bytes:
    found = bytearray()
    for name, tensor in tensors.items():
        spelled = name.encode()
        found += ENTRY.pack(len(spelled), DTYPES.index(tensor.dtype), tensor.dim()) + spelled
        found += struct.pack(f"<{tensor.dim()}Q", *tensor.shape)
    return bytes(found)


def _described(table: bytes) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
    """Return dtype and shape of each tensor in a table. Raises BadFrame."""
    found: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {}
    place = 0
    try:
        while place < len(table):
            length, code, count = ENTRY.unpack_from(table, place)
            place += ENTRY.size
            name, dtype = table[place : place + length].decode(), DTYPES[code]
            if len(table) < place + length or count > MOST_DIMENSIONS or name in found:
                raise BadFrame("a wrong table of tensors")
            shape = struct.unpack_from(f"<{count}Q", table, place + length)
            place += length + 8 * count
            found[name] = dtype, shape
    except (struct.error, UnicodeDecodeError, IndexError):
        raise BadFrame("a wrong table of tensors") from None
    return found


def _facts(text: bytes) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise BadFrame("facts that are no JSON") from None
    if not isinstance(found, dict):
        raise BadFrame("facts that are no JSON object")
    return found


def _kind(number: int) -> Kind:
    try:
        return Kind(number)
    except ValueError:
        raise BadFrame(f"a frame of an unknown kind {number}") from None
