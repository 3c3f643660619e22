"""The command `watch`: it follows a real run to its end, and tells how each kind of run ended."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from command import Run, command, processes_with, started


def wait_for(path: Path, training: warm.Started) -> None:
    while not path.exists():
        assert training.poll() is None
        time.sleep(0.01)


def test_watches_a_run_to_its_end(run: Run, folder: Path) -> None:
    with started("--strategy", "dp=2", "--epochs", "10", "--out", "out", "--set", "pause=0.02") as training:
        wait_for(folder / "out/run.json", training)
        done = run("watch", "out", "--every", "0.2")
        assert training.wait(60) == 0
    lines = done.stdout.splitlines()
    assert lines[0] == "small under dp=2 on 2 workers"
    assert lines[-1] == "finished after 40 steps"
    assert "\x1b" not in done.stdout
    assert any(line.startswith("step ") and "samples/s" in line for line in lines)
    assert any(line.startswith("held out: loss ") for line in lines)
    assert len(lines) == len(set(lines))


def test_states_of_ended_runs(run: Run, folder: Path, mark: str) -> None:
    def state(name: str) -> dict[str, object]:
        found: dict[str, object] = json.loads(run("watch", name, "--once", "--json", "--quiet").stdout)
        return found

    run("train", "work.py:small", "--strategy", "dp=2", "--steps", "3", "--out", "done", "--quiet")
    found = state("done")
    assert (found["state"], found["step"], found["total_steps"], found["text"]) == ("finished", 3, 3, "")
    assert found["checkpoint"]
    options = ("--steps", "9", "--checkpoint-every", "1", "--set")
    run("train", "work.py:small", "--workers", "2", "--out", "failed", *options, "fail=raise", status=1)
    found = state("failed")
    assert found["state"] == "failed"
    assert "sample 17 is odd" in str(found["text"])
    with started("--out", "killed", *options, "fail=wait") as training:
        wait_for(folder / "killed/metrics.jsonl", training)
        while not state("killed")["step"]:
            assert training.poll() is None
        assert state("killed")["state"] == "running"
        training.kill()
        training.communicate()
    assert processes_with(mark) == []
    shown = run("watch", "killed").stdout  # ends at once
    assert "ended without a word after step 2: killed, or its machine went down; --resume goes on from step" in shown


def test_not_a_run(run: Run, folder: Path) -> None:
    (folder / "empty").mkdir()
    for name in ("empty", "none", "work.py"):
        for options in ((), ("--once",)):
            done = run("watch", name, *options, status=2)
            assert (done.stdout, done.stderr.count("\n")) == ("", 1)
            assert done.stderr.startswith(f"shardwise: {name}")
    assert "every=0: must be" in run("watch", "empty", "--every", "0", status=2).stderr


def test_reader_that_goes_away(run: Run, folder: Path) -> None:
    with started("--out", "out", "--set", "fail=wait", "--steps", "9") as training:
        wait_for(folder / "out/run.json", training)
        watching = warm.Started(
            command("watch", "out", "--every", "0.05", "--json"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )
        assert watching.stdout is not None
        assert json.loads(watching.stdout.readline())["run"] == "out"
        watching.stdout.close()
        assert watching.wait(30) == 0


@pytest.mark.parametrize("track", ["tensorbord", "none,wandb", ""])
def test_unknown_tracker(run: Run, folder: Path, track: str) -> None:
    done = run("train", "work.py:small", "--track", track, "--out", "out", status=2)
    assert done.stderr.count("\n") == 1
    assert "known are tensorboard, wandb, mlflow, none" in done.stderr
    assert not (folder / "out").exists()


def test_frame_is_drawn_in_its_place(run: Run, folder: Path) -> None:
    with started("--out", "out", "--set", "fail=wait", "--steps", "9") as training:
        wait_for(folder / "out/run.json", training)
        master, slave = pty.openpty()
        watching = warm.Started(command("watch", "out", "--every", "0.05"), stdout=slave, stderr=subprocess.PIPE)
        os.close(slave)
        shown = ""
        while shown.count("step") < 6:
            shown += os.read(master, 4096).decode()
        watching.send_signal(signal.SIGINT)
        _, errors = watching.communicate(30)
        os.close(master)
    assert (watching.returncode, errors) == (0, "shardwise: watched no longer; the run is not touched\n")
    first, *others = shown.replace("\r\n", "\n").split("\x1b[J")
    assert first.startswith("\x1b[1msmall under single on 1 worker")
    assert all(frame.startswith("\x1b[1msmall") for frame in others)
    lines = first.rpartition("\x1b[")[0].count("\n")
    assert first.endswith(f"\x1b[{lines}F")
