from __future__ import annotations

import logging
import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
from full_disk import full_disk  # noqa: F401 - a fixture

from shardwise.run.training.tracking.choice import open_trackers
from shardwise.run.training.tracking.tracker import TrackedRun, Tracker

pytest.importorskip("tensorboard")


def scalars(folder: Path, name: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return [(event.step, event.value) for event in events.Scalars(name)]


def board(folder: Path, done: int = 0) -> Tracker:
    (tracker,) = open_trackers(["tensorboard"], TrackedRun(folder, done))
    return tracker


def test_tensorboard_reads_it(tmp_path: Path) -> None:
    tracker = board(tmp_path)
    for step in (1, 2, 3):
        tracker.step(step, {"loss": 1.0 / step})
    tracker.evaluation(3, {"evaluation/loss": 5.0})
    tracker.close(failed=False)
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 0.5), (3, pytest.approx(1 / 3))]
    assert scalars(tmp_path / "tensorboard", "evaluation/loss") == [(3, 5.0)]


def test_run_that_goes_on_takes_the_place_of_later_steps(tmp_path: Path) -> None:
    for done, value in ((0, 1.0), (2, 7.0)):
        tracker = board(tmp_path, done)
        for step in range(done + 1, 5):
            tracker.step(step, {"loss": value})
        tracker.close(failed=False)
    assert scalars(tmp_path / "tensorboard", "loss") == [(1, 1.0), (2, 1.0), (3, 7.0), (4, 7.0)]


def test_full_disk_is_told_once(
    full_disk: Path,  # noqa: F811
    caplog: pytest.LogCaptureFixture,
    capfd: pytest.CaptureFixture[str],
) -> None:
    threads = threading.active_count()
    tracker = board(full_disk)
    assert threading.active_count() == threads
    values: Mapping[str, float] = {"loss": 1.0, "accuracy": 2.0}
    with caplog.at_level(logging.WARNING):
        for step in range(5000):
            tracker.step(step, values)
        tracker.close(failed=False)
        board(full_disk).close(failed=False)
    first, *_ = (record.getMessage() for record in caplog.records)
    assert first == "TensorBoard failed, the run goes on without it: No space left on device"
    assert len(caplog.records) <= 2  # one of each board
    assert capfd.readouterr().err == ""


def test_file_in_the_place_of_its_folder(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "tensorboard").write_text("")
    with caplog.at_level(logging.WARNING):
        tracker = board(tmp_path)
        tracker.step(1, {"loss": 1.0})
        tracker.close(failed=False)
    assert len(caplog.records) == 1
    assert f"File exists ({tmp_path / 'tensorboard'})" in caplog.text
