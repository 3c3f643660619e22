"""Two hosts, their link cut for real and their processes killed: the run ends on each, and nothing saved is lost."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from two_hosts import Started, again, await_steps, elastic, ended, kill_all, mpi, static, told, torchrun
from ways import processes_with

from benchmarks import hosts

pytestmark = pytest.mark.xdist_group("hosts")  # whose names and addresses are always the same

SECONDS = 5.0
"""Seconds after which a silent host counts as gone, in these tests."""

TRAIN = ("train", "work.py:small", "--strategy", "dp=2", "--out", "out", "--quiet", "--no-proof")
LONG = (*TRAIN, "--epochs", "500", "--set", "pause=0.05", "--checkpoint-every", "5")


@pytest.fixture(autouse=True)
def two_hosts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Two hosts, named engines-0 and engines-1."""
    monkeypatch.setattr(hosts, "PREFIX", "engines")
    monkeypatch.setenv("SHARDWISE_HOST_SECONDS", f"{SECONDS:g}")
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, (str(folder), os.environ.get("PYTHONPATH")))))
    with hosts.hosts(1e9):
        yield


def outcome(started: Started, seconds: float) -> list[list[str]]:
    """Return what each host has said; all of them must end within so many seconds."""
    end = time.monotonic() + seconds
    return [told(process.communicate(timeout=max(0.1, end - time.monotonic()))[1]) for process in started]


def command_lines() -> bytes:
    """Return the command lines of all processes, as ps reads them."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found.append(path.read_bytes())
    return b"".join(found)


def goes_on(folder: Path) -> None:
    """The newest checkpoint is whole, and the run goes on from it on one host."""
    newest = max((folder / "out" / "checkpoints").glob("step-*"))
    step = int(newest.name.removeprefix("step-"))
    done = again(*TRAIN, "--steps", str(step + 2), "--resume", "--json")
    assert done.returncode == 0, done.stderr
    assert f'"steps": {step + 2}' in done.stdout


@pytest.mark.parametrize("loss", [hosts.cut_link, hosts.lose_all], ids=["down", "silent"])
def test_a_link_that_is_cut_ends_the_run_on_both_hosts(folder: Path, mark: str, loss: object) -> None:
    assert callable(loss)
    with ended([torchrun(static(host), host, *LONG) for host in (0, 1)]) as started:
        await_steps(folder / "out", started, 12)
        loss()
        said = outcome(started, SECONDS + 30)
        assert [len(lines) for lines in said] == [1, 1]
        for host, (line,) in enumerate(said):
            other = 1 - host
            assert line.startswith(f"host engines-{other} (worker {other}) cannot be reached for 5 s; all workers are")
        assert [process.returncode for process in started] == [1, 1]
        assert processes_with(mark) == []
    goes_on(folder)


def test_torchruns_agent_ends_too_when_it_cannot_reach_its_rendezvous(folder: Path, mark: str) -> None:
    with ended([torchrun(elastic(host), host, *LONG) for host in (0, 1)]) as started:
        await_steps(folder / "out", started, 2)
        hosts.cut_link()
        said = outcome(started, SECONDS + 40)
        assert [line.partition(" (")[0] for lines in said for line in lines] == ["host engines-1", "host engines-0"]
        assert processes_with(mark) == []


@pytest.mark.parametrize("gone", [0, 1])
def test_a_host_whose_processes_are_killed_is_named_by_the_other(folder: Path, mark: str, gone: int) -> None:
    with ended([torchrun(static(host), host, *LONG) for host in (0, 1)]) as started:
        await_steps(folder / "out", started, 12)
        kill_all(gone)
        said = outcome(started, 30)
        assert said[gone] == []
        (line,) = said[1 - gone]
        assert line.startswith(f"worker {gone} on host engines-{gone} ended without a word: killed")
        assert processes_with(mark) == []
    goes_on(folder)


def test_a_worker_that_does_not_get_on_is_not_taken_for_a_lost_host(folder: Path) -> None:
    steps = ("--steps", "40", "--set", "pause=0.05")
    with ended([torchrun(static(host), host, *TRAIN, *steps) for host in (0, 1)]) as started:
        await_steps(folder / "out", started, 3)
        workers = [each for each in processes_with("RANK=1") if each != started[1].pid]
        for number in (signal.SIGSTOP, signal.SIGCONT):
            for worker in workers:
                os.kill(worker, number)
            time.sleep(2 * SECONDS)
        assert workers
        assert outcome(started, 60) == [[], []]
        assert [process.returncode for process in started] == [0, 0]


def test_an_error_is_told_once_on_all_hosts(folder: Path) -> None:
    with ended([torchrun(static(host), host, *LONG, "--set", "fail=1") for host in (0, 1)]) as started:
        said = outcome(started, 60)
        assert said == [[], ["worker 1 failed"]]


def test_mpirun_gives_up_a_host_that_is_gone(folder: Path, mark: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with ended([mpi(folder, monkeypatch, *LONG)]) as started:
        await_steps(folder / "out", started, 12)
        hosts.cut_link()
        _, errors = started[0].communicate(timeout=SECONDS + 30)
        assert started[0].returncode == 1
        assert "on node engines-1" in errors or "host engines-1 (worker 1) cannot be reached" in errors, errors
        end = time.monotonic() + SECONDS + 30
        while processes_with(mark) and time.monotonic() < end:
            time.sleep(0.1)
        assert processes_with(mark) == []
    goes_on(folder)


def test_no_secret_is_in_a_command_line_or_a_log(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    secret = "hush-hush-hush-hush"
    monkeypatch.setenv("SHARDWISE_TOKEN", secret)
    monkeypatch.setenv("WANDB_API_KEY", secret)
    with ended([mpi(folder, monkeypatch, *TRAIN, "--steps", "40", "--set", "pause=0.05")]) as started:
        await_steps(folder / "out", started, 2)
        lines = command_lines()
        output, errors = started[0].communicate(timeout=120)
        assert started[0].returncode == 0, errors
    assert b"work.py:small" in lines
    assert secret.encode() not in lines
    assert secret not in output + errors
    kept = [path for path in (folder / "out").rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    assert kept == []
