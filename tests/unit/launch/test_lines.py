"""Lines that workers print go out whole, whatever Python was told about its streams."""

from __future__ import annotations

import sys
from io import BytesIO, TextIOWrapper

import pytest

from shardwise.launch.output import write_whole_lines


class Writes(BytesIO):
    """Bytes that notes each write."""

    def __init__(self) -> None:
        super().__init__()
        self.each: list[bytes] = []

    def write(self, data: bytes) -> int:  # type: ignore[override]
        self.each.append(bytes(data))
        return len(data)


@pytest.mark.parametrize("unbuffered", [False, True])
@pytest.mark.parametrize("name", ["stdout", "stderr"])
def test_a_line_is_one_write(name: str, unbuffered: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    writes = Writes()
    monkeypatch.setattr(sys, name, TextIOWrapper(writes, write_through=unbuffered))
    write_whole_lines()
    for number in range(3):
        print(f"line {number}", file=getattr(sys, name))
    assert writes.each == [b"line 0\n", b"line 1\n", b"line 2\n"]
