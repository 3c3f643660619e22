from __future__ import annotations

import os
from pathlib import Path

import pytest

from shardwise.run.jsonfile import parse_json, replace_file, write_json
from shardwise.run.training.metrics_file import MetricsFile


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Record the names of files that were waited for until they were on disk."""
    names: list[str] = []

    def fsync(file: int) -> None:
        names.append(Path(os.readlink(f"/proc/self/fd/{file}")).name)

    monkeypatch.setattr(os, "fsync", fsync)
    return names


def test_document_is_on_disk_before_it_has_its_name(tmp_path: Path, synced: list[str]) -> None:
    write_json(tmp_path / "run.json", {"steps": 3})
    assert synced == [".run.json.partial", tmp_path.name]
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


def test_metrics_are_on_disk_when_asked_for_and_at_the_end(tmp_path: Path, synced: list[str]) -> None:
    file = MetricsFile(tmp_path / "metrics.jsonl", 0)
    file.write({"step": 1})
    assert synced == []  # not at every step
    file.sync()
    file.close()
    assert synced == ["metrics.jsonl"] * 2


def test_what_was_there_stays_where_the_new_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    write_json(tmp_path / "run.json", {"steps": 3})
    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "run.json", b"new")
    assert parse_json((tmp_path / "run.json").read_bytes()) == {"steps": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b"\xff", b"1" * 5000, b'{"a": 1} x'])
def test_all_that_is_wrong_is_a_value_error(content: bytes) -> None:
    with pytest.raises(ValueError, match=r"."):
        parse_json(content)
