from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import RunFolderError
from shardwise.run.training.lock import LOCK, is_locked, release_lock, released, take_lock
from shardwise.run.training.run_folder import create_run, reopen_run

REQUEST: dict[str, Any] = {
    "workload": "small",
    "source": None,
    "settings": {},
    "seed": 0,
    "strategy": "single",
    "steps": 3,
    "epochs": None,
}


@pytest.fixture(autouse=True)
def free(tmp_path: Path) -> Any:
    yield
    release_lock(tmp_path)
    release_lock(tmp_path / "run")


def test_one_run_after_another_in_one_process(tmp_path: Path) -> None:
    take_lock(tmp_path)
    with pytest.raises(RunFolderError, match=f"process {os.getpid()} trains in it"):
        take_lock(tmp_path)
    with pytest.raises(ValueError, match="broken"), released(tmp_path):
        raise ValueError("broken")
    take_lock(tmp_path)


def test_new_run_and_one_that_goes_on(tmp_path: Path) -> None:
    folder = create_run(tmp_path / "run", REQUEST)
    with pytest.raises(RunFolderError, match="is in use"):
        reopen_run(folder, REQUEST)
    release_lock(folder)
    with pytest.raises(RunFolderError, match="holds a run of workload 'small'"):
        reopen_run(folder, {**REQUEST, "workload": "other"})
    reopen_run(folder, REQUEST)


def test_two_that_begin_in_one_folder(tmp_path: Path) -> None:
    take_lock(tmp_path)
    with pytest.raises(RunFolderError, match="is in use"):
        create_run(tmp_path, REQUEST)
    release_lock(tmp_path)
    assert create_run(tmp_path, REQUEST) == tmp_path  # the file alone does not count


def test_file_system_without_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    take_lock(tmp_path)
    told = capsys.readouterr().err
    assert told.count("\n") == 1
    assert f"{tmp_path} cannot be locked (No locks available)" in told


@pytest.mark.parametrize("kind", ["link", "pipe"])
def test_something_else_in_its_place(tmp_path: Path, kind: str) -> None:
    (tmp_path / "mine").write_text("precious")
    if kind == "link":
        (tmp_path / LOCK).symlink_to(tmp_path / "mine")
    else:
        os.mkfifo(tmp_path / LOCK)
    with pytest.raises(RunFolderError, match=r"\.lock (cannot be made|is no regular file)"):
        take_lock(tmp_path)
    assert (tmp_path / "mine").read_text() == "precious"


def test_odd_holder(tmp_path: Path) -> None:
    file = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    os.write(file, b"\x1b[2J\nroot")
    fcntl.flock(file, fcntl.LOCK_EX)
    with pytest.raises(RunFolderError, match="another process trains in it"):
        take_lock(tmp_path)
    os.close(file)


def test_look_at_a_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert is_locked(tmp_path) is False  # nobody has ever trained in it
    take_lock(tmp_path)
    assert is_locked(tmp_path) is True
    release_lock(tmp_path)
    assert is_locked(tmp_path) is False
    take_lock(tmp_path)  # the look has not kept it
    assert is_locked(tmp_path / "gone") is False
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / LOCK).symlink_to(tmp_path / LOCK)
    assert is_locked(tmp_path / "other") is None

    def none(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    assert is_locked(tmp_path) is None


def test_look_of_another_does_not_refuse_a_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = os.open(tmp_path / LOCK, os.O_RDWR | os.O_CREAT)
    fcntl.flock(file, fcntl.LOCK_SH)  # as `is_locked` does for an instant
    monkeypatch.setattr("shardwise.run.training.lock.time.sleep", lambda seconds: os.close(file))
    take_lock(tmp_path)
