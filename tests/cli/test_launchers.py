"""Under another launcher: one line for what is wrong, no worker that outlives it, and its restarts go on."""

from __future__ import annotations

import signal
import subprocess
import time
from pathlib import Path

import pytest
import warm
from command import Run, command, processes_with

TORCHRUN = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
SECONDS = 60.0


def test_rank_alone_does_not_make_a_command_mute(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "1")
    done = run("train", "work.py:small", "--strategy", "tq=2", status=2)
    assert "unknown axis 'tq'" in done.stderr


@pytest.mark.parametrize("rank", ["0", "1"])
def test_workers_that_do_not_come_are_told(rank: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    stale = {"RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": "29473"}
    for name, value in (stale | {"SHARDWISE_MEET_SECONDS": "1"}).items():
        monkeypatch.setenv(name, value)
    done = run("train", "work.py:small", "--strategy", "dp=2", status=2)
    (line,) = done.stderr.splitlines()
    assert line.startswith(
        f"shardwise: rank {rank} of 2 (RANK, WORLD_SIZE): the other workers did not meet at localhost"
    )


def test_what_is_wrong_is_told_once_under_torchrun(run: Run) -> None:
    done = run("train", "work.py:small", "--strategy", "dp=3", launcher=TORCHRUN, status=1)
    assert done.stderr.count("shardwise: strategy dp=3 needs 3 workers, there are 2") == 1


def test_workers_end_with_a_torchrun_that_is_killed(folder: Path, mark: str) -> None:
    arguments = ("train", "work.py:small", "--strategy", "dp=2", "--set", "fail=wait", "--quiet")
    # fresh processes: warm ones are children of their server, which lives on
    process = subprocess.Popen(command(*arguments, launcher=TORCHRUN), stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    while "waiting" not in process.stderr.readline():
        assert process.poll() is None
    process.kill()
    process.wait()
    process.stderr.close()
    deadline = time.monotonic() + SECONDS
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(mark) == []


def test_restarts_of_torchrun_go_on(run: Run, folder: Path) -> None:
    text = (folder / "work.py").read_text()
    once = text.replace(
        "    def loss(output, batch):\n",
        "    def loss(output, batch):\n"
        "        first = os.environ['TORCHELASTIC_RESTART_COUNT'] == '0'\n"
        "        if len(calls) == 6 and first and os.environ['RANK'] == '1':\n"
        "            os.kill(os.getpid(), signal.SIGKILL)\n",
    )
    assert once != text
    (folder / "work.py").write_text(once)
    length = ("--strategy", "dp=2", "--steps", "8", "--checkpoint-every", "2", "--out", "out", "--quiet")
    run(
        *("train", "work.py:small", *length, "--resume", "auto"),
        launcher=(*TORCHRUN, "--max-restarts", "1"),
    )
    assert (folder / "out" / "checkpoints" / "step-00000008").is_dir()


def test_a_job_that_hangs_under_torchrun_is_told_once(run: Run, mark: str) -> None:
    arguments = ("--strategy", "dp=2", "--set", "fail=sleep", "--hang-timeout", "2", "--quiet")
    done = run("train", "work.py:small", *arguments, launcher=TORCHRUN, status=1)
    assert done.stderr.count("shardwise: worker 1 has been in misbehave (work.py:") == 1
    assert processes_with(mark) == []


def test_work_that_is_left_is_no_success_under_torchrun(run: Run) -> None:
    arguments = ("--strategy", "dp=2", "--set", "fail=leave", "--quiet")
    done = run("train", "work.py:small", *arguments, launcher=TORCHRUN, status=1)
    assert "shardwise: the workload's code called os._exit(0), the work was not done" in done.stderr


def test_torchrun_that_is_told_to_end_leaves_a_checkpoint(folder: Path) -> None:
    arguments = ("train", "work.py:small", "--strategy", "dp=2", "--set", "pause=0.05", "--epochs", "100", "--quiet")
    process = warm.Started(command(*arguments, "--out", "out", launcher=TORCHRUN), stderr=subprocess.PIPE)
    metrics = folder / "out" / "metrics.jsonl"
    while not metrics.exists() or metrics.read_text().count("\n") < 2:
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=SECONDS)
    assert errors.count("shardwise: told to end after step ") == 1
    assert list((folder / "out" / "checkpoints").glob("step-*"))
