"""Trackers cannot harm a run: neither one that fails nor one that is slow."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from shardwise.errors import RequestError
from shardwise.run.training.tracking import choice, tracker
from shardwise.run.training.tracking.choice import open_trackers, settle_trackers
from shardwise.run.training.tracking.tracker import BackgroundTracker, GuardedTracker, TrackedRun, Tracker

Make = Callable[[str, Callable[[], Tracker]], Tracker]


class Notebook:
    """Tracker that remembers what it gets, fails at one step, and waits for `go` before it takes any."""

    def __init__(self, fail_at: int = 0, go: threading.Event | None = None) -> None:
        self.taken: list[object] = []
        self._fail_at, self._go = fail_at, go

    def step(self, step: int, values: Mapping[str, float]) -> None:
        if self._go is not None:
            self._go.wait(10)
        if step == self._fail_at:
            raise ValueError("the server\nsays no")
        self.taken.append((step, dict(values)))

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        self.taken.append(("evaluation", step, dict(values)))

    def close(self, *, failed: bool) -> None:
        self.taken.append(("closed", failed))


@pytest.mark.parametrize("kind", [GuardedTracker, BackgroundTracker])
def test_everything_arrives_in_order(kind: Make) -> None:
    notebook = Notebook()
    guarded = kind("Notebook", lambda: notebook)
    for step in (1, 2):
        guarded.step(step, {"loss": step / 2})
    guarded.evaluation(2, {"evaluation/loss": 7.0})
    guarded.close(failed=False)
    expected = [(1, {"loss": 0.5}), (2, {"loss": 1.0}), ("evaluation", 2, {"evaluation/loss": 7.0}), ("closed", False)]
    assert notebook.taken == expected


@pytest.mark.parametrize("kind", [GuardedTracker, BackgroundTracker])
def test_first_error_is_told_once_and_ends_its_use(kind: Make, caplog: pytest.LogCaptureFixture) -> None:
    notebook = Notebook(fail_at=2)
    guarded = kind("Notebook", lambda: notebook)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 6):
            guarded.step(step, {})
        guarded.close(failed=False)
    assert notebook.taken == [(1, {}), ("closed", True)]
    (record,) = caplog.records
    assert record.getMessage() == "Notebook failed, the run goes on without it: ValueError: the server says no"


@pytest.mark.parametrize("kind", [GuardedTracker, BackgroundTracker])
def test_one_that_cannot_be_opened(kind: Make, caplog: pytest.LogCaptureFixture) -> None:
    def fail() -> Tracker:
        raise OSError(28, "No space left on device", "place")

    with caplog.at_level(logging.WARNING):
        guarded = kind("Notebook", fail)
        guarded.step(1, {})
        guarded.evaluation(1, {})
        guarded.close(failed=False)
    assert [record.getMessage() for record in caplog.records] == [
        "Notebook failed, the run goes on without it: No space left on device (place)"
    ]


def test_slow_one_delays_nothing(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "LONGEST_QUEUE", 3)
    go = threading.Event()
    notebook = Notebook(go=go)
    background = BackgroundTracker("Notebook", lambda: notebook, closing_seconds=0.05)
    with caplog.at_level(logging.WARNING):
        for step in range(1, 100):
            background.step(step, {})
        assert notebook.taken == []
        background.close(failed=False)
    first, second = (record.getMessage() for record in caplog.records)
    assert first == "Notebook is slower than the training: some steps are left out of it"
    assert second.startswith("Notebook has not written everything 0.05 s after the end of the run")
    go.set()


def test_one_that_opens_slowly_is_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracker, "OPENING_SECONDS", 0.01)
    go, notebook = threading.Event(), Notebook()

    def make() -> Tracker:
        go.wait(10)
        return notebook

    background = BackgroundTracker("Notebook", make)
    background.step(1, {})
    assert notebook.taken == []
    go.set()
    background.close(failed=True)
    assert notebook.taken == [(1, {}), ("closed", True)]


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        (None, None),
        ("none", ()),
        ([], ()),
        ("wandb", ("wandb",)),
        ("wandb, tensorboard,wandb", ("wandb", "tensorboard")),
        (["mlflow", "tensorboard"], ("mlflow", "tensorboard")),
    ],
)
def test_choice(asked: str | list[str] | None, expected: object, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "find_spec", lambda name: ModuleSpec(name, None, origin="there"))
    assert settle_trackers(asked) == expected


@pytest.mark.parametrize("asked", ["wand", "", "none,wandb", [3], {"wandb": 1}, 7])
def test_wrong_choice(asked: object) -> None:
    with pytest.raises(RequestError, match=r"known are tensorboard, wandb, mlflow, none|give names, such as"):
        settle_trackers(asked)  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["tensorboard", "wandb", "mlflow"])
@pytest.mark.parametrize("folder", [True, False])
def test_one_that_is_not_installed(name: str, folder: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = ModuleSpec(name, None, is_package=True) if folder else None  # a folder of that name, without __init__.py
    monkeypatch.setattr(choice, "find_spec", lambda name: found)
    with pytest.raises(RequestError, match=rf"track={name}: .* is not installed: pip install 'shardwise\[{name}\]'"):
        settle_trackers(name)
    assert open_trackers(None, TrackedRun(tmp_path)) == []  # TensorBoard is used if it is there


def test_identity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    run = TrackedRun(tmp_path)
    assert run.identity("wandb") is None
    run.keep_identity("wandb", "abc")
    assert run.identity("wandb") == "abc"
    for damage in ("{", '{"id": 3}', "[]"):
        (tmp_path / "wandb.json").write_text(damage)
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            assert run.identity("wandb") is None
        assert "wandb begins a new run" in caplog.text
