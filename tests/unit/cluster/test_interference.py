"""Other programs on the cores of a measurement are noticed, named and waited for."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from shardwise.cluster.measure import interference, machine
from shardwise.cluster.measure.interference import (
    await_quiet,
    busiest,
    busy_seconds,
    cores_of_others,
    described,
    is_busy,
)

TICKS = os.sysconf("SC_CLK_TCK")


@pytest.fixture
def proc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a system with two cores, of which this process may use the first."""
    monkeypatch.setattr(interference, "PROC", tmp_path)
    monkeypatch.setattr(machine, "cores", lambda: 1)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0}, raising=False)
    return tmp_path


def write(proc: Path, seconds: float, *, stolen: float = 0.0) -> None:
    """Write that the first core was busy for `seconds`, and the second one much longer."""
    first = [seconds * TICKS, 0, 0, 7e6, 5e5, 3e5, 4e5, stolen * TICKS, seconds * TICKS, 0]
    words = " ".join(str(round(value)) for value in first)
    (proc / "stat").write_text(f"cpu  9 9 9 9 9 9 9 9 9 9\ncpu0 {words}\ncpu1 {10**9} 0 0 0 0 0 0 0 0 0\nbtime 7\n")


def passing(monkeypatch: pytest.MonkeyPatch, at: Callable[[float], None], own: float = 0.0) -> None:
    """Let a sleep call `at` with the seconds that have passed, in which this process computes at rate `own`."""
    now = [100.0]

    def sleep(seconds: float) -> None:
        now[0] += seconds
        at(now[0] - 100.0)

    monkeypatch.setattr(time, "sleep", sleep)
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(time, "process_time", lambda: own * (now[0] - 100.0))
    at(0.0)


def test_busy_seconds_are_of_programs_on_the_own_cores(proc: Path) -> None:
    write(proc, 3.0, stolen=1.5)
    assert busy_seconds() == pytest.approx(4.5)


def test_a_system_that_counts_nothing(proc: Path) -> None:
    assert busy_seconds() == 0.0
    assert cores_of_others(0.0) == 0.0


def test_others_are_what_this_process_did_not_compute(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    passing(monkeypatch, lambda seconds: write(proc, 0.9 * seconds), own=0.2)
    assert cores_of_others(1.0) == pytest.approx(0.7, abs=0.02)


def test_services_of_a_large_host_are_no_disturbance(monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for cores in (2, 64):
        monkeypatch.setattr(machine, "cores", lambda cores=cores: cores)
        found.append([is_busy(used) for used in (0.1, 1.0, 5.0)])
    assert found == [[False, True, True], [False, False, True]]


def test_it_waits_until_others_are_done(
    proc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passing(monkeypatch, lambda seconds: write(proc, min(seconds, 5.0)))
    assert await_quiet(60.0) == 0.0
    assert time.perf_counter() == pytest.approx(107.0, abs=1.0)
    assert "waiting up to 60 s for an idle machine: other programs use 1.0 of 1 core\n" in capsys.readouterr().err


def test_it_waits_for_a_bounded_time(
    proc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    passing(monkeypatch, lambda seconds: write(proc, seconds))
    assert await_quiet(10.0, quiet=True) == pytest.approx(1.0)
    assert time.perf_counter() < 113.0
    assert capsys.readouterr().err == ""


def test_the_busiest_other_process_is_named(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def at(seconds: float) -> None:
        for process, rate in ((os.getpid(), 2.0), (41, 0.9), (42, 0.3)):
            folder = proc / str(process)
            folder.mkdir(exist_ok=True)
            (folder / "comm").write_text("a (b) c\n")
            fields = [*("S" if place == 0 else "0" for place in range(11)), str(round(rate * seconds * TICKS)), "0"]
            (folder / "stat").write_text(f"{process} (a (b) c) {' '.join(fields)}")

    passing(monkeypatch, at)
    assert busiest(1.0) == "a (b) c (process 41)"
    assert described(0.9, busiest(1.0)).endswith("core, a (b) c (process 41) most")
    (proc / "41" / "stat").unlink()
    (proc / "42" / "stat").unlink()
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    assert busiest(1.0) == ""
