from __future__ import annotations

import logging
import threading
from pathlib import Path

import pytest
from full_disk import full_disk  # noqa: F401 - a fixture

from shardwise.run.training.tensorboard import EventFile

pytest.importorskip("tensorboard")


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    board = EventFile(tmp_path / "tensorboard", 0)
    for step in (1, 2, 3):
        board.add(step, {"loss": 1.0 / step, "seconds": None})
    board.close()
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]


def test_run_that_goes_on_takes_the_place_of_later_steps(tmp_path: Path) -> None:
    folder = tmp_path / "tensorboard"
    for done, value in ((0, 1.0), (2, 7.0)):
        board = EventFile(folder, done)
        for step in range(done + 1, 5):
            board.add(step, {"loss": value})
        board.close()
    assert scalars(folder, "loss") == [(1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0)]


def test_full_disk_is_told_once(
    full_disk: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    threads = threading.active_count()
    board = EventFile(full_disk / "tensorboard", 0)
    assert threading.active_count() == threads
    with caplog.at_level(logging.WARNING):
        for step in range(5000):
            board.add(step, {"loss": 1.0, "accuracy": 2.0})
        board.close()
        EventFile(full_disk / "tensorboard", 0).close()
    first, *_ = (record.getMessage() for record in caplog.records)
    assert "cannot be written: No space left on device; the run goes on without TensorBoard's files" in first
    assert len(caplog.records) <= 2  # one of each board
    assert capfd.readouterr().err == ""


def test_file_in_the_place_of_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("")
    with caplog.at_level(logging.WARNING):
        board = EventFile(tmp_path / "tensorboard", 0)
        board.add(1, {"loss": 1.0})
        board.close()
    assert len(caplog.records) == 1
