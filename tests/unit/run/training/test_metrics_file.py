from __future__ import annotations

import json
import logging
import os
import random
from pathlib import Path
from typing import Any

import pytest
from full_disk import full_disk  # noqa: F401 - a fixture
from mutations import mutate_bytes, mutate_document

from shardwise.errors import RunFolderError, ShardwiseError
from shardwise.run.training.metrics_file import MetricsFile

LINES: list[dict[str, Any]] = [
    *({"step": step, "epoch": 0, "loss": 1.0 / step, "samples": 8} for step in range(1, 7)),
    {"step": 6, "epoch": 1, "evaluation": {"accuracy": 0.5}},
    {"step": 7, "epoch": 1, "loss": 0.1, "samples": 8},
]
CASES = 1000


def encoded(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def mended(path: Path, done: int) -> list[dict[str, Any]]:
    MetricsFile(path, done).close()
    return [json.loads(line) for line in path.read_bytes().split(b"\n") if line]


def test_goes_on_after_a_step(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encoded(LINES) + b'{"step": 8, "lo')
    file = MetricsFile(path, 6)
    file.write({"step": 6, "epoch": 1, "evaluation": {"accuracy": 0.5}})  # made again: it is there already
    file.write({"step": 7, "epoch": 1, "loss": 0.2})
    file.close()
    expected = [*LINES[:-1], {"step": 7, "epoch": 1, "loss": 0.2}]
    assert [json.loads(line) for line in path.read_bytes().splitlines()] == expected
    assert not caplog.records


def test_evaluation_that_is_not_there_is_written(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(encoded(LINES[:6]))
    file = MetricsFile(path, 6)
    file.write(LINES[6])
    file.close()
    assert path.read_bytes() == encoded(LINES[:7])


def test_damaged_line_is_left_out_and_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "metrics.jsonl"
    content = encoded(LINES[:2]) + b"\x00\xff not JSON\n" + b'{"step": "three"}\n' + encoded(LINES[2:])
    path.write_bytes(content)
    with caplog.at_level(logging.WARNING):
        assert mended(path, 6) == LINES[:-1]
    (record,) = caplog.records
    assert "metrics.jsonl: 2 damaged lines are left out; the file as it was is" in record.getMessage()
    assert (tmp_path / "metrics.damaged").read_bytes() == content


def test_fuzzed_lines(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for case in range(CASES):
        dice = random.Random(case)
        lines = encoded(LINES).splitlines(keepends=True)
        at = dice.randrange(len(lines))
        if case % 2:
            lines[at] = mutate_document(json.loads(lines[at]), dice) + b"\n"
        else:
            lines[at] = mutate_bytes(lines[at], dice)
        path.write_bytes(b"".join(lines))
        kept = path.read_bytes().splitlines(keepends=True)
        found = mended(path, 6)
        assert all(type(line["step"]) is int and line["step"] <= 6 for line in found)
        untouched = [json.loads(line) for line in kept if line in encoded(LINES[:7]).splitlines(keepends=True)]
        assert all(line in found for line in untouched)


def test_pipe_in_its_place(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(RunFolderError, match=r"metrics.jsonl: is a pipe"):
        MetricsFile(tmp_path / "metrics.jsonl", 0)


def test_very_long_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"[" * 3_000_000 + b"\n" + encoded(LINES[:2]))
    assert mended(path, 6) == LINES[:2]


def test_full_disk(full_disk: Path) -> None:  # noqa: F811
    file = MetricsFile(full_disk / "metrics.jsonl", 0)

    def fill() -> None:
        for step in range(10**6):
            file.write({"step": step})

    with pytest.raises(ShardwiseError, match=r"metrics.jsonl cannot be written: No space left on device; make room"):
        fill()
    file.close()
    (full_disk / "filling").unlink(missing_ok=True)
    found = mended(full_disk / "metrics.jsonl", 10**6)
    assert found == [{"step": step} for step in range(len(found))]
