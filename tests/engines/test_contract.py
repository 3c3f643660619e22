"""Every engine keeps its promises: ranks, status, one error, no orphan, signals, whole lines, resume elsewhere."""

from __future__ import annotations

import json
import re
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from _pytest.mark import ParameterSet
from ways import SECONDS, STATIC_WAY, WAYS, Way, await_no_process, await_steps, run, start

LONG = ("--strategy", "dp=2", "--epochs", "500", "--set", "pause=0.05", "--out", "out", "--quiet", "--no-proof")

CLUSTERS = ("slurm", "ray", "spark")


def in_group(way: Way) -> ParameterSet:
    """The tests of one engine run in one process of pytest, which starts its cluster if it has one."""
    return pytest.param(way, id=str(way), marks=pytest.mark.xdist_group(way.engine))


@pytest.fixture(params=map(in_group, WAYS))
def way(request: pytest.FixtureRequest, folder: Path, mark: str) -> Way:
    found: Way = request.param
    if found.engine in CLUSTERS:
        request.getfixturevalue(found.engine)
    return found


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    """Return exit status, output and errors."""
    try:
        output, errors = process.communicate(timeout=SECONDS)
    finally:
        process.kill()
    return process.returncode, output, errors


def check_output(way: Way, done: tuple[int, str, str], lines: int) -> None:
    """Check the exit status, the document, the ranks, and that the lines of both workers are whole."""
    status, output, errors = done
    assert status == 0, errors
    assert json.loads(output)["strategy"] == "dp=2"
    told = sorted(line for line in errors.splitlines() if line.startswith("rank "))
    place = ("0 of 1", "0 of 1") if way.name == "srun" else ("0 of 2", "1 of 2")
    assert told == [f"rank {rank} of 2, {place[rank]}, by {way.engine}" for rank in (0, 1)], errors
    expected = [f"line {number} of rank {rank} " + 200 * str(rank) for rank in (0, 1) for number in range(lines)]
    assert sorted(line for line in errors.splitlines() if "line " in line) == sorted(expected)


def test_ranks_one_document_and_whole_lines_of_two_jobs_at_once(way: Way, mark: str) -> None:
    lines = 15 if way.engine == "mpi" else 200  # mpirun passes on blocks of 4 KiB, and may cut a line between two
    length = ("--strategy", "dp=2", "--steps", "3", "--set", f"lines={lines}", "--quiet", "--json")
    jobs = [start(way, 2, *length, "--out", f"out{number}") for number in (0, 1)]
    for job in jobs:
        check_output(way, ended(job), lines)
    await_no_process(mark)


@pytest.mark.usefixtures("folder")
def test_a_static_rendezvous(mark: str) -> None:
    job = start(STATIC_WAY, 2, "--strategy", "dp=2", "--steps", "3", "--out", "out", "--quiet", "--json")
    check_output(STATIC_WAY, ended(job), 0)
    await_no_process(mark)


def test_an_error_is_told_once_by_the_worker_that_has_it(way: Way, mark: str) -> None:
    done = run(way, 2, "--strategy", "dp=2", "--steps", "5", "--out", "out", "--quiet", "--no-proof", "--set", "fail=1")
    assert done.returncode == 1, done.stderr
    assert done.stderr.count("ValueError: sample 17 is odd") == 1, done.stderr
    assert done.stderr.count("shardwise: worker 1 failed") == 1
    assert done.stderr.count("Traceback (most recent call last)") == (2 if way.name.startswith("torchrun") else 1)
    await_no_process(mark)


def test_a_worker_that_is_killed_ends_the_job(way: Way, mark: str) -> None:
    fail = ("--set", "fail=kill")
    done = run(way, 2, "--strategy", "dp=2", "--steps", "5", "--out", "out", "--quiet", "--no-proof", *fail)
    assert done.returncode != 0
    assert "TIMED OUT" not in done.stderr
    if way.outside:
        assert done.returncode == 1
    await_no_process(mark)


def test_a_wrong_request_is_told_once(way: Way, mark: str) -> None:
    done = run(way, 2, "--strategy", "dp=2", "--steps", "5", "--set", "no_such=1", "--quiet")
    assert done.stderr.count("no_such") == 1, done.stderr
    assert done.returncode == (1 if way.name.startswith("torchrun") else 2), done.stderr
    await_no_process(mark)


def test_interrupted(way: Way, folder: Path, mark: str) -> None:
    process = start(way, 2, *LONG)
    await_steps(folder / "out", process)
    process.send_signal(signal.SIGINT)
    if way.name == "srun":
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)  # the first one only shows the state of the tasks
    status, _, errors = ended(process)
    assert status != 0
    if way.outside:
        assert status == 130
        assert errors.count("shardwise: interrupted") == 1, errors
    await_no_process(mark)


def test_told_to_end_it_leaves_a_checkpoint_from_which_others_go_on(
    way: Way, folder: Path, mark: str, run_of_three: Path
) -> None:
    """The run begins with three workers of torchrun, goes on with two here, and again with three of another engine."""
    shutil.copytree(run_of_three, folder / "out")
    process = start(way, 2, *LONG, "--resume")
    await_steps(folder / "out", process, steps=4)
    way.tell(process)
    status, _, errors = ended(process)
    (step,) = re.findall(r"shardwise: told to end after step (\d+)", errors)
    assert status == (1 if way.name.startswith("torchrun") else 143), errors
    await_no_process(mark)
    assert (folder / "out" / "checkpoints" / f"step-{int(step):08}").is_dir()
    other = next(
        each for each in WAYS if each.outside and each.engine == ("torchrun" if way.engine == "mpi" else "mpi")
    )
    more = int(step) + 2
    length = ("--strategy", "fsdp=3", "--steps", str(more), "--out", "out", "--resume", "--quiet", "--no-proof")
    done = run(other, 3, *length)
    assert done.returncode == 0, done.stderr
    steps = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, more + 1))


def test_no_worker_outlives_a_launcher_that_is_killed(way: Way, folder: Path, mark: str) -> None:
    process = start(way, 2, *LONG)
    await_steps(folder / "out", process)
    process.kill()
    process.communicate()
    await_no_process(mark, 60)
