"""A worker that gets on is not taken for one that hangs, whatever it gets on with."""

from __future__ import annotations

import itertools
import time
from pathlib import Path

import pytest

from shardwise.launch import watch
from shardwise.run.checkpoint.checked_file import FileSum, write_file


@pytest.fixture
def seat(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> watch._Seat:
    seat = watch._Seat(0, 1, watch.FolderBoard(str(tmp_path)), lambda _: None)
    monkeypatch.setattr(watch, "_seat", seat)
    return seat


def test_each_piece_of_a_checkpoint_counts(seat: watch._Seat, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = itertools.count(start=time.monotonic(), step=50.0)  # a disk that takes most of a minute for each piece
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    begin = seat.last
    write_file(tmp_path / "file", iter([b"a", b"b", b"c"]))
    assert seat.last >= begin + 100
    written = seat.last
    FileSum.of(tmp_path / "file")
    assert seat.last > written
    assert seat.beats == 0  # no step was done
