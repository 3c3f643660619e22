"""A run's state from its files: while it goes on, and after every kind of end."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import RunFolderError
from shardwise.run.jsonfile import write_json
from shardwise.run.live.follower import Follower
from shardwise.run.training.lock import release_lock
from shardwise.run.training.messages import add_message
from shardwise.run.training.run_folder import create_run, reopen_run

REQUEST: dict[str, Any] = {
    "workload": "small",
    "source": None,
    "settings": {},
    "seed": 0,
    "strategy": "dp=2",
    "workers": 2,
    "steps": 40,
    "epochs": None,
}


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder of a run that a process trains in."""
    folder = create_run(tmp_path / "run", REQUEST)
    yield folder
    release_lock(folder)


def begin(run: Path, step: int = 0, ago: float = 60.0) -> None:
    fields = {"step": step, "total_steps": 40, "predicted_seconds": 0.4, "predicted_memory_bytes": 2048}
    with (run / "messages.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time() - ago, "kind": "begin", **fields}) + "\n")


def add(run: Path, **record: Any) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.write(json.dumps(record) + "\n")


def steps(run: Path, first: int, last: int, *, seconds: float = 0.5, loss: float | None = 1.0) -> None:
    """Write steps that took `seconds` each, the last of them now."""
    for step in range(first, last + 1):
        fields = {"loss": loss, "seconds": seconds, "samples_per_second": 8 / seconds, "epoch": 0}
        add(run, step=step, time=time.time() - seconds * (last - step), **fields)


def state(run: Path) -> dict[str, Any]:
    found = Follower(run).state()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    return found


def test_run_that_goes_on(run: Path) -> None:
    assert state(run)["state"] == "starting"
    add_message(run, "begin", step=0, total_steps=40, predicted_seconds=0.4)
    begun = json.loads((run / "messages.jsonl").read_text())["time"]
    for step in range(1, 11):
        add(run, step=step, time=begun + step * 0.6, loss=1 / step, seconds=0.5, samples_per_second=16.0, epoch=0)
    add(run, step=10, epoch=0, evaluation={"loss": 0.2, "accuracy": None})
    found = state(run)
    assert (found["state"], found["step"], found["total_steps"], found["loss"]) == ("running", 10, 40, 0.1)
    assert (found["step_seconds"], found["samples_per_second"]) == (0.5, 16.0)
    assert found["error"] == pytest.approx(-0.2)
    assert found["evaluation"] == {"step": 10, "values": {"loss": 0.2, "accuracy": None}}
    assert found["losses"] == [1 / step for step in range(1, 11)]
    # 0.6 s from step to step, with what is between steps; the clock of the file is ahead of ours here
    assert found["seconds_left"] == pytest.approx(30 * 0.6)


def test_pause_since_the_last_step_is_no_time_left(run: Path) -> None:
    begin(run)
    steps(run, 1, 10)
    follower = Follower(run)
    before = follower.state()["seconds_left"]
    time.sleep(0.05)
    after = follower.state()
    assert 0.04 < before - after["seconds_left"] < 0.5
    assert after["seconds_since_step"] > 0.04


@pytest.mark.parametrize("how", ["finished", "stopped", "interrupted", "failed"])
def test_ends(run: Path, how: str) -> None:
    begin(run)
    steps(run, 1, 3)
    add_message(run, "end", how=how, text="worker 1 died" if how == "failed" else "")
    release_lock(run)
    found = state(run)
    assert (found["state"], found["step"]) == (how, 3)
    assert found["text"] == ("worker 1 died" if how == "failed" else "")
    assert found["seconds_left"] is None


def test_killed_run(run: Path) -> None:
    begin(run)
    steps(run, 1, 3)
    assert state(run)["state"] == "running"
    release_lock(run)  # as the kernel does
    assert state(run)["state"] == "killed"


def test_run_that_goes_on_after_an_end(run: Path) -> None:
    begin(run)
    steps(run, 1, 3)
    add_message(run, "warning", text="the disk is slow")
    with (run / "messages.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time() - 10, "kind": "end", "how": "failed", "text": "broken"}) + "\n")
    assert state(run)["state"] == "failed"  # whoever holds the lock: `compare` does so until all trainings are over
    release_lock(run)
    reopen_run(run, REQUEST)
    assert state(run)["state"] == "starting"
    assert state(run)["warnings"][0]["text"] == "the disk is slow"
    add_message(run, "warning", text="a checkpoint is damaged")
    begin(run, 2, ago=0.0)
    found = state(run)
    assert (found["state"], found["text"]) == ("running", "")
    assert [warning["text"] for warning in found["warnings"]] == ["a checkpoint is damaged"]
    assert found["step_seconds"] is None  # those before the resume may be of another strategy
    release_lock(run)
    assert state(run)["state"] == "killed"


def test_resume_that_is_killed_before_it_begins(run: Path) -> None:
    with (run / "messages.jsonl").open("a") as file:
        file.write(json.dumps({"time": time.time() - 10, "kind": "end", "how": "stopped", "text": ""}) + "\n")
    release_lock(run)
    assert state(run)["state"] == "stopped"
    reopen_run(run, REQUEST)
    release_lock(run)
    assert state(run)["state"] == "killed"


def test_run_of_an_earlier_version(run: Path) -> None:
    steps(run, 1, 3)
    release_lock(run)
    assert state(run)["state"] == "killed"
    for stopped, expected in ((None, "finished"), (15, "stopped")):
        write_json(run / "summary.json", {"steps": 3, "stopped": stopped})
        assert state(run)["state"] == expected


def test_file_system_without_locks(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    begin(run)
    monkeypatch.setattr("shardwise.run.live.follower.is_locked", lambda folder: None)
    assert state(run)["state"] == "unknown"
    add_message(run, "end", how="finished", text="")
    assert state(run)["state"] == "finished"


def test_only_what_is_new_is_read(run: Path) -> None:
    begin(run)
    steps(run, 1, 5)
    follower = Follower(run)
    assert follower.state()["step"] == 5
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 6, "loss": 0.')  # half a line
        file.flush()
        assert follower.state()["step"] == 5
        file.write("5}\n")
    assert (follower.state()["step"], follower.state()["loss"]) == (6, 0.5)
    (run / "new").write_text('{"step": 1, "loss": 7.0}\n')  # a resume writes the file anew
    (run / "new").replace(run / "metrics.jsonl")
    assert follower.state()["losses"] == [7.0]


def test_damage_is_passed_over(run: Path) -> None:
    begin(run)
    with (run / "metrics.jsonl").open("ab") as file:
        for line in (
            b"\xff\x00",
            b"[]",
            b'{"step": "x", "loss": 3}',
            b'{"step": 1, "loss": "\\u001b[2J"}',
            b"{" * 9999,
        ):
            file.write(line + b"\n")
        file.write(b'{"step": 2, "loss": 1.5, "seconds": -1e999, "evaluation": 3}\n')
    (run / "ranks.jsonl").write_text('{"busy_seconds": ["a"]}\n{"busy_seconds": []}\n3\n')
    (run / "summary.json").write_text("{")
    add_message(run, "warning", text="\x1b[2J\n" * 3)
    found = state(run)
    assert (found["step"], found["loss"], found["first_not_finite_step"]) == (2, 1.5, 1)
    assert found["busy_seconds"] is None
    assert found["warnings"][0]["text"].isprintable()


@pytest.mark.parametrize("name", ["metrics.jsonl", "messages.jsonl", "ranks.jsonl", "summary.json", "memory.json"])
def test_pipe_in_place_of_a_file(run: Path, name: str) -> None:
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    assert state(run)["state"] == "starting"


def test_not_finite_losses(run: Path) -> None:
    begin(run)
    steps(run, 1, 2)
    steps(run, 3, 4, loss=None)
    found = state(run)
    assert (found["loss"], found["first_not_finite_step"], found["losses"]) == (None, 3, [1.0, 1.0])


def test_busy_ranks(run: Path) -> None:
    begin(run)
    lines = [{"step": 1, "busy_seconds": [9.0]}, *({"step": n, "busy_seconds": [1.0, 1.0 + n]} for n in (2, 4))]
    (run / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert state(run)["busy_seconds"] == [1.0, 4.0]  # the first line is of fewer workers, before a resume
    lines = [{"step": 1, "busy_seconds": [None, None]}, {"step": 2, "busy_seconds": [2.0, 3.0], "profiled": True}]
    (run / "ranks.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    follower = Follower(run)
    assert follower.state()["busy_seconds"] == [2.0, 3.0]  # on GPUs profiled steps alone have these times
    with (run / "ranks.jsonl").open("a") as file:
        file.write('{"step": 3, "busy_seconds": [1.0, 1.5]}\n')
    assert follower.state()["busy_seconds"] == [1.0, 1.5]


def test_memory(run: Path) -> None:
    begin(run)
    assert state(run)["memory_bytes"] is None
    add_message(run, "memory", step=3, bytes=1000)
    assert (state(run)["memory_bytes"], state(run)["memory_bytes_by_worker"]) == (1000, None)
    write_json(run / "memory.json", {"ranks": [{"rank": rank, "peak_bytes": 1200 + rank} for rank in range(2)]})
    assert state(run)["memory_bytes_by_worker"] == [1200, 1201]
    os.utime(run / "memory.json", (time.time() - 90, time.time() - 90))  # of the training before a resume
    write_json(run / "summary.json", {"memory_bytes_by_worker": [1000, 3000]})
    assert state(run)["memory_bytes"] == 1000  # the summary is of a training before this one
    add_message(run, "end", how="finished", text="")
    release_lock(run)
    assert state(run)["memory_bytes"] == 3000


def test_checkpoint(run: Path) -> None:
    begin(run)
    assert state(run)["checkpoint"] is None
    for name in ("step-00000010", "step-00000020", ".step-00000030.partial"):
        (run / "checkpoints" / name).mkdir(parents=True)
    os.utime(run / "checkpoints/step-00000020", (time.time() - 60, time.time() - 60))
    found = state(run)["checkpoint"]
    assert found["step"] == 20
    assert found["seconds_ago"] == pytest.approx(60, abs=5)


def test_long_run_has_few_points(run: Path) -> None:
    begin(run)
    with (run / "metrics.jsonl").open("w") as file:
        file.writelines(f'{{"step": {step}, "loss": {step / 1000}}}\n' for step in range(1, 5001))
    losses = state(run)["losses"]
    assert 128 <= len(losses) <= 256
    assert losses == sorted(losses)
    assert losses[0] < 0.05


def test_states_end_with_the_run(run: Path) -> None:
    begin(run)
    states = Follower(run).states(0.01)
    assert next(states)["state"] == "running"
    steps(run, 1, 40)
    add_message(run, "end", how="finished", text="")
    release_lock(run)
    assert [found["state"] for found in states] == ["finished"]


@pytest.mark.parametrize(
    ("name", "said"), [("none", "there is no such folder"), ("empty", "holds no run"), ("damaged", "is not the descr")]
)
def test_folder_that_holds_no_run(tmp_path: Path, name: str, said: str) -> None:
    if name != "none":
        (tmp_path / name).mkdir()
    if name == "damaged":
        (tmp_path / name / "run.json").write_text("{}")
    with pytest.raises(RunFolderError, match=said):
        Follower(tmp_path / name)
