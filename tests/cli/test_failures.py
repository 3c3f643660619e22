"""A failure ends all of a run, within seconds, and is told once."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from command import Run, command, processes_with, read_until, started

SECONDS = 60.0
"""Longest from the failure to the end of everything, on a machine that has other things to do; else it is two."""


@pytest.mark.parametrize("how", ["raise", "kill"])
def test_a_worker_that_dies(how: str, run: Run, folder: Path, mark: str) -> None:
    done = run("train", "work.py:small", "--strategy", "dp=2", "--set", f"fail={how}", "--out", "out", status=1)
    (failed,) = re.findall(r"failing at ([\d.]+)\n", done.stderr)
    assert time.time() - float(failed) < SECONDS
    assert processes_with(mark) == []
    assert done.stdout == ""
    assert "Connection" not in done.stderr
    last = done.stderr.splitlines()[-1]
    if how == "raise":
        assert done.stderr.count("Traceback") == 1
        assert done.stderr.count("ValueError: sample 17 is odd") == 1
        assert "work.py" in done.stderr
        assert last == "shardwise: worker 1 failed, all workers have ended"
    else:
        assert "Traceback" not in done.stderr
        assert last.startswith("shardwise: worker 1 was killed by SIGKILL")


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["ctrl-c", "terminate"]
)
def test_a_signal_to_the_command(number: signal.Signals, status: int, folder: Path, mark: str) -> None:
    with started("--strategy", "dp=2", "--set", "fail=wait", "--grace", "0.5", "--out", "out") as process:
        read_until(process, "waiting")  # of two workers, which may write into each other's line
        process.send_signal(number)
        output, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == status
    assert "Traceback" not in errors
    assert output == ""
    assert (
        errors.splitlines()[-1]
        == {
            130: "shardwise: interrupted, all workers have ended",
            143: "shardwise: told to end: no checkpoint was written within 0.5 s",
        }[status]
    )
    assert processes_with(mark) == []


@pytest.mark.parametrize("how", ["wait", "stop"])
def test_ctrl_c_twice_ends_at_once(how: str, folder: Path, mark: str) -> None:
    with started("--strategy", "dp=2", "--set", f"fail={how}") as process:
        read_until(process, "waiting" if how == "wait" else "failing at")
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    assert process.returncode == 130
    assert errors.splitlines()[-1] == "shardwise: interrupted, all workers have ended"
    assert processes_with(mark) == []


def test_work_that_is_left_is_no_success(run: Run, folder: Path) -> None:
    done = run("train", "work.py:small", "--strategy", "dp=2", "--set", "fail=leave", "--quiet", status=1)
    assert done.stderr.splitlines()[-1] == "shardwise: worker 1 ended with exit status 0, its work was not done"


def test_a_run_that_failed_before_its_first_step_is_not_in_the_way(run: Run, folder: Path) -> None:
    text = (folder / "work.py").read_text().replace("nn.Sequential(", "no_weights() or nn.Sequential(")
    (folder / "work.py").write_text(text + "\ndef no_weights():\n    raise OSError('no such weights')\n")
    done = run("train", "work.py:small", "--out", "out", "--steps", "1", status=1)
    assert done.stderr.count("OSError: no such weights") == 1
    assert not (folder / "out").exists()


def validated(out: int, *, page: bool) -> warm.Started:
    runs = Path(__file__).parents[1] / "published" / "runs.csv"
    arguments = command("validate", str(runs), *([] if page else ["--json", "--quiet"]))
    return warm.Started(arguments, stdout=out, stderr=subprocess.PIPE)


@pytest.mark.parametrize("page", [True, False])
def test_a_reader_that_has_enough(*, page: bool) -> None:
    reading, writing = os.pipe()
    process = validated(writing, page=page)
    os.close(writing)
    os.close(reading)  # as `| true`
    assert process.communicate(timeout=SECONDS)[1] == ""
    assert process.returncode == 0


@pytest.mark.parametrize("page", [True, False])
def test_a_full_disk(*, page: bool) -> None:
    with Path("/dev/full").open("w") as full:
        process = validated(full.fileno(), page=page)
        assert process.communicate(timeout=SECONDS)[1] == (
            "shardwise: the result cannot be written: No space left on device; the command itself was done\n"
        )
    assert process.returncode == 1
