"""Local workers: they start, compute, fail and end together with the process that started them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest

from shardwise.errors import CheckpointError, WorkerFailed
from shardwise.launch.local import run_local

SECONDS = 60.0
"""Longest that a failing run may take; it is a few seconds, nearly all of it the start, on a quiet machine."""


def processes_with(mark: str) -> list[int]:
    """Processes that carry `mark` in their environment, but for this one."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
            if state != "Z" and int(folder.name) != os.getpid() and mark in (folder / "environ").read_text():
                found.append(int(folder.name))
        except (OSError, UnicodeDecodeError):
            continue
    return found


@pytest.fixture
def mark(monkeypatch: pytest.MonkeyPatch) -> str:
    value = f"mark-{os.getpid()}-{time.monotonic_ns()}"
    monkeypatch.setenv("SHARDWISE_TEST_MARK", value)
    return value


def test_each_worker_calls_the_function_and_rank_0_returns() -> None:
    def add_ranks(more: int) -> dict[str, Any]:  # a closure: travels by value
        import gc

        import torch
        import torch.distributed as dist

        total = torch.tensor(float(dist.get_rank() + more))
        dist.all_reduce(total)
        return {"total": total, "threads": torch.get_num_threads(), "rank": dist.get_rank(), "gc": gc.isenabled()}

    result = run_local(add_ranks, (10,), workers=2, threads=1)
    assert result["total"].item() == 21
    assert result["rank"] == 0
    assert result["gc"]
    assert result["threads"] == int(os.environ.get("OMP_NUM_THREADS", "1"))


def fail(how: str) -> None:
    import torch
    import torch.distributed as dist

    for step in range(100):
        if step == 3 and dist.get_rank() == 1:
            if how in ("0", "3"):
                os._exit(int(how))
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise {"error": ValueError, "request": CheckpointError}[how]("number 7 is wrong")
        dist.all_reduce(torch.ones(1))


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("error", "worker 1 failed: ValueError: number 7 is wrong"),
        ("3", "worker 1 ended with exit status 3"),
        ("0", "worker 1 ended with exit status 0"),
        ("kill", "worker 1 was killed by SIGKILL"),
    ],
)
def test_a_worker_that_dies_ends_the_run(how: str, message: str, mark: str, capfd: pytest.CaptureFixture[str]) -> None:
    begin = time.monotonic()
    with pytest.raises(WorkerFailed) as caught:
        run_local(fail, (how,), workers=2)
    assert time.monotonic() - begin < SECONDS
    assert str(caught.value).startswith(message)
    assert caught.value.rank == 1
    assert ("in fail" in caught.value.traceback) == (how == "error")
    assert "Connection" not in caught.value.traceback
    assert processes_with(mark) == []
    assert capfd.readouterr() == ("", "")


def test_a_wrong_request_comes_back_as_itself() -> None:
    with pytest.raises(CheckpointError, match=r"^number 7 is wrong$"):
        run_local(fail, ("request",), workers=2)


def test_signal_handlers_and_environment_stay() -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    environment = dict(os.environ)
    run_local(int, workers=1)
    assert handlers == [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    assert dict(os.environ) == environment


SCRIPT = """
    import sys, time
    from shardwise.launch.local import run_local
    class Here:                                   # defined in the script, which has no __main__ guard
        def __init__(self, value): self.value = value
    def work(here):
        print("noise")
        if here.value == "wait":
            sys.stderr.write("ready\\n")          # at once: what two workers print may be mixed within a line
            time.sleep(60)
        return Here(here.value + 1)
    print(run_local(work, (Here({value}),), workers=2).value)
"""


def script(value: str) -> list[str]:
    return [sys.executable, "-c", textwrap.dedent(SCRIPT).format(value=value)]


def test_a_plain_script_without_a_guard() -> None:
    done = subprocess.run(script("41"), capture_output=True, text=True, check=True)
    assert done.stdout == "42\n"  # what workers print goes to standard error
    assert "noise" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_no_worker_outlives_the_parent(number: signal.Signals, mark: str) -> None:
    process = subprocess.Popen(
        script("'wait'"),
        stderr=subprocess.PIPE,
        text=True,
        bufsize=1,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # ignored where tests run in the background
    )
    assert process.stderr is not None
    seen = 0
    while seen < 2:
        line = process.stderr.readline()
        assert line, "it ended before both workers were ready"
        seen += line == "ready\n"
    process.send_signal(number)
    process.wait(timeout=SECONDS)
    process.stderr.close()
    expected = {signal.SIGINT: -signal.SIGINT, signal.SIGTERM: 143, signal.SIGKILL: -signal.SIGKILL}
    assert process.returncode == expected[number]
    deadline = time.monotonic() + 5
    while processes_with(mark) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert processes_with(mark) == []
