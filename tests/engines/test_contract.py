"""Every engine keeps its promises: ranks, status, one error, no orphan, signals, whole lines, resume elsewhere."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from ways import WAYS, Way, await_no_process, await_steps, run, start

LONG = ("--strategy", "dp=2", "--epochs", "500", "--set", "pause=0.05", "--out", "out", "--quiet", "--no-proof")


@pytest.fixture(params=WAYS, ids=str)
def way(request: pytest.FixtureRequest, folder: Path, mark: str) -> Way:
    if request.param.engine == "slurm":
        request.getfixturevalue("slurm")
    found: Way = request.param
    return found


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    try:
        _, errors = process.communicate(timeout=90)
    finally:
        process.kill()
    return process.returncode, errors


def test_ranks_and_one_document(way: Way, mark: str) -> None:
    done = run(way, 2, "--strategy", "dp=2", "--steps", "3", "--out", "out", "--quiet", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["strategy"] == "dp=2"
    told = sorted(line for line in done.stderr.splitlines() if line.startswith("rank "))
    assert [line.split(",")[0] for line in told] == ["rank 0 of 2", "rank 1 of 2"], done.stderr
    assert all(line.endswith(f"by {way.engine}") for line in told)
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
    status, errors = ended(process)
    assert status != 0
    if way.outside:
        assert status == 130
        assert errors.count("shardwise: interrupted") == 1, errors
    await_no_process(mark)


def test_told_to_end_it_leaves_a_checkpoint(way: Way, folder: Path, mark: str) -> None:
    process = start(way, 2, *LONG)
    await_steps(folder / "out", process)
    way.tell(process)
    status, errors = ended(process)
    assert errors.count("shardwise: told to end after step ") == 1, errors
    assert list((folder / "out" / "checkpoints").glob("step-*"))
    assert status == (1 if way.name.startswith("torchrun") else 143), errors
    await_no_process(mark)


def test_no_worker_outlives_a_launcher_that_is_killed(way: Way, folder: Path, mark: str) -> None:
    process = start(way, 2, *LONG)
    await_steps(folder / "out", process)
    process.kill()
    process.communicate()
    await_no_process(mark, 60)


def test_lines_are_whole(way: Way) -> None:
    many = 15 if way.engine == "mpi" else 200  # mpirun passes on blocks of 4 KiB, and may cut a line between two
    done = run(way, 2, "--strategy", "dp=2", "--steps", "3", "--out", "out", "--quiet", "--set", f"lines={many}")
    assert done.returncode == 0, done.stderr
    lines = [line for line in (done.stdout + done.stderr).splitlines() if "line " in line]
    expected = [f"line {number} of rank {rank} " + 200 * str(rank) for rank in (0, 1) for number in range(many)]
    assert sorted(lines) == sorted(expected)


def test_two_jobs_at_once(way: Way) -> None:
    if way.name == "torchrun static":
        pytest.xfail("its port is the user's to choose")
    jobs = [start(way, 2, "--strategy", "dp=2", "--steps", "3", "--out", f"out{i}", "--quiet") for i in (0, 1)]
    for job in jobs:
        status, errors = ended(job)
        assert status == 0, errors


def test_goes_on_under_another_engine_and_number_of_workers(way: Way, folder: Path) -> None:
    run(way, 2, "--strategy", "dp=2", "--steps", "2", "--out", "out", "--quiet", "--no-proof")
    others = {"torchrun": "mpi", "mpi": "torchrun", "slurm": "mpi"}
    other = next(each for each in WAYS if each.outside and each.engine == others.get(way.engine, "torchrun"))
    done = run(other, 3, "--strategy", "fsdp=3", "--steps", "4", "--out", "out", "--resume", "--quiet", "--no-proof")
    assert done.returncode == 0, done.stderr
    assert (folder / "out" / "checkpoints" / "step-00000004").is_dir()
    back = run(way, 3, "--strategy", "dp=3", "--steps", "5", "--out", "out", "--resume", "--quiet", "--no-proof")
    assert back.returncode == 0, back.stderr
    assert (folder / "out" / "checkpoints" / "step-00000005").is_dir()
