"""Strategies are compared in turns; one that fails has its row, and no worker stays behind."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest
import warm
from command import Run, command, processes_with

LONG = ("--steps", "3000", "--set", "samples=2800", "--set", "pause=0.01", "--no-proof")


def strategies(*names: str) -> tuple[str, ...]:
    return tuple(word for name in names for word in ("--strategy", name))


def comparison(folder: Path) -> dict[str, Any]:
    document: dict[str, Any] = json.loads((folder / "out" / "compare.json").read_text())
    return document


def test_in_turns_with_plain_loops_beside(run: Run, folder: Path, mark: str) -> None:
    chosen = strategies("single", "dp=2", "fsdp=2")
    done = run("compare", "work.py:small", *chosen, "--steps", "20", "--out", "out", "--json", "--quiet")
    found = json.loads(done.stdout)
    assert found == {**comparison(folder), "report": "out/report.html"}
    assert (folder / "out" / "report.html").is_file()
    assert [row["strategy"] for row in found["results"]] == ["single", "dp=2", "fsdp=2"]
    assert [row["beside"] for row in found["by_hand"]] == ["dp=2", "fsdp=2"]
    assert len(found["groups"]) == 1
    assert found["slice_steps"] == 3
    assert {len(values) for values in found["samples"].values()} == {6}
    for row in (*found["results"], *found["by_hand"]):
        assert row["loss_difference"] < 1e-5, "also that of torch's own, of the same samples from the same weights"
        assert row["low"] <= row["measured_seconds"] <= row["high"]
        assert row["steps"] == 20
    times = [_times(folder / row["run"] / "metrics.jsonl") for row in found["results"]]
    assert len(set(times)) == len(times)
    assert all((folder / row["run"] / "ranks.jsonl").exists() for row in found["results"])
    assert processes_with(mark) == []


def _times(path: Path) -> float:
    return path.stat().st_mtime


def test_turns_change_no_training(run: Run) -> None:
    options = ("--epochs", "3", "--quiet", "--json")
    compared = json.loads(run("compare", "work.py:small", *strategies("pp=2"), *options).stdout)["results"][0]
    alone = json.loads(run("train", "work.py:small", *strategies("pp=2"), *options).stdout)
    assert (compared["loss"], compared["metrics"]) == (alone["loss"], alone["metrics"])


def test_one_that_fails_has_its_row_and_the_others_go_on(run: Run, folder: Path, mark: str) -> None:
    chosen = (*strategies("single", "dp=2"), "--set", "fail=kill", "--steps", "9", "--no-proof", "--no-by-hand")
    done = run("compare", "work.py:small", *chosen, "--out", "out", "--json", "--quiet")
    single, dp = json.loads(done.stdout)["results"]
    assert single["failed"] is None
    assert single["steps"] == 9
    assert dp["failed"] == "worker 1 was killed by SIGKILL (out of memory?)"
    assert dp["loss"] is None or dp["steps"] < 9
    assert "shardwise: dp=2: worker 1 was killed by SIGKILL (out of memory?); the others go on" in done.stderr
    assert processes_with(mark) == []


def test_where_all_fail_the_first_error_ends_it(run: Run, folder: Path, mark: str) -> None:
    chosen = (*strategies("dp=2", "fsdp=2"), "--set", "fail=kill", "--steps", "9", "--no-proof", "--no-by-hand")
    done = run("compare", "work.py:small", *chosen, "--out", "out", "--json", "--quiet", status=1)
    assert done.stdout == ""
    assert done.stderr.splitlines()[-1] == "shardwise: worker 1 was killed by SIGKILL (out of memory?)"
    assert all(row["failed"] for row in comparison(folder)["results"])
    assert processes_with(mark) == []


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_it_keeps_and_shows_what_it_has(number: int, status: int, folder: Path, mark: str) -> None:
    line = command("compare", "work.py:small", *strategies("single", "dp=2"), *LONG, "--out", "out", "--json")
    process = warm.Started(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        _await_steps(folder / "out" / "dp2" / "metrics.jsonl", 150)
        os.kill(process.pid, number)
        stdout, stderr = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == status, stderr
    found = json.loads(stdout)
    assert found == comparison(folder)
    assert found["interrupted"]
    assert all(row["measured_seconds"] > 0.01 for row in found["results"])
    assert all(0 < row["steps"] < 3000 for row in found["results"])
    assert "Interrupted: what was measured until then." in stderr
    assert processes_with(mark) == []


def test_a_worker_that_waits_for_its_turn_is_killed(folder: Path, mark: str) -> None:
    """The training whose worker it is fails when its turn comes; workers that wait are stopped, and take no time."""
    arguments = ("--steps", "600", *LONG[2:], "--out", "out", "--quiet", "--json", "--no-by-hand")
    line = command("compare", "work.py:small", *strategies("single", "dp=2"), *arguments)
    process = warm.Started(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    try:
        _await_steps(folder / "out" / "dp2" / "metrics.jsonl", 50)
        victims = [each for each in processes_with(mark) if _variable(each, "WORLD_SIZE") == "2"]
        looks = [_states(processes_with(mark)) for _ in range(20)]
        assert sum("T" in states for states in looks) > 10, "those that wait are stopped"
        assert all(any(state != "T" for state in states) for states in looks), "one trains"
        os.kill(victims[0], signal.SIGKILL)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, stderr
    single, dp = json.loads(stdout)["results"]
    assert (single["failed"], single["steps"]) == (None, 600)
    assert "was killed by SIGKILL" in dp["failed"]
    assert 0 < dp["steps"] < 600
    assert dp["measured_seconds"] > 0.01
    assert processes_with(mark) == []


def _states(processes: list[int]) -> list[str]:
    """Return the states of processes as the kernel shows them."""
    time.sleep(0.05)
    return [Path(f"/proc/{each}/stat").read_text().rpartition(")")[2].split()[0] for each in processes]


def _variable(process: int, name: str) -> str:
    folder = Path(f"/proc/{process}")
    content = (warm.environment(folder) or (folder / "environ").read_bytes()).decode().split("\0")
    return next((entry.partition("=")[2] for entry in content if entry.startswith(f"{name}=")), "")


def _await_steps(path: Path, count: int) -> None:
    end = time.monotonic() + 120
    while not path.exists() or len(path.read_bytes().splitlines()) < count:
        assert time.monotonic() < end
        time.sleep(0.1)
