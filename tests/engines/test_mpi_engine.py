"""Open MPI alone: several hosts, hosts that cannot be reached, ranks of jobs of one worker, no Open MPI at all."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from ways import SHARDWISE, await_no_process

pytestmark = [pytest.mark.usefixtures("folder"), pytest.mark.xdist_group("mpi")]

TRAIN = (*SHARDWISE, "train", "work.py:small", "--strategy", "dp=2", "--quiet", "--no-proof", "--out", "out")

AGENT = """#!/bin/sh
# what ssh does, for hosts a and b of this machine: AGENT [-x] HOST COMMAND
while [ "${1#-}" != "$1" ]; do shift; done
case "$1" in a | b) ;; *) echo "no route to $1" >&2; exit 255 ;; esac
export TMPDIR="$0-$1"; mkdir -p "$TMPDIR"  # both hosts would make one folder there at once
shift
exec sh -c "$*"
"""


def call(*line: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(line, capture_output=True, text=True, timeout=120, check=False, stdin=subprocess.DEVNULL)


@pytest.fixture
def agent(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Reach hosts a and b, which are this machine, as mpirun reaches hosts."""
    path = folder / "agent"
    path.write_text(AGENT)
    path.chmod(0o755)
    monkeypatch.setenv("OMPI_MCA_plm_rsh_agent", str(path))


@pytest.mark.usefixtures("agent")
def test_hosts_that_cannot_be_reached_are_named_before_anything_starts(mark: str) -> None:
    done = call(*TRAIN, "--steps", "2", "--engine", "mpi", "--hosts", "a,far,b,farther")
    assert done.returncode == 2
    assert "far (no route to far), farther (no route to farther) cannot be reached" in done.stderr
    await_no_process(mark)


@pytest.mark.usefixtures("agent")
def test_two_hosts(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")  # a and b have no entry in the name service
    done = call(*TRAIN, "--steps", "3", "--engine", "mpi", "--hosts", "a,b")
    assert done.returncode == 0, done.stderr
    assert "rank 1 of 2, 0 of 1, by mpi" in done.stderr


def test_a_job_of_one_worker_is_local() -> None:
    done = call("mpirun", "--allow-run-as-root", "-n", "1", *TRAIN, "--steps", "2")
    assert done.returncode == 0, done.stderr


def test_a_job_of_another_size_is_refused_once() -> None:
    line = ("mpirun", "--allow-run-as-root", "--oversubscribe", "-n", "3")
    done = call(*line, *TRAIN, "--steps", "2")
    assert done.returncode == 2
    assert done.stderr.count("strategy dp=2 needs 2 workers, there are 3") == 1


def test_without_open_mpi_its_package_is_named(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("PATH", str(folder))
    done = call(*TRAIN, "--engine", "mpi")
    assert done.returncode == 2
    assert "engine mpi: mpirun is not installed: install Open MPI (Debian: apt-get install openmpi-bin)" in done.stderr


def test_no_secret_is_in_a_command_line(monkeypatch: pytest.MonkeyPatch) -> None:
    from shardwise.launch.engines.mpi import mpirun
    from shardwise.launch.launcher import LaunchRequest

    environment = {"SHARDWISE_SECRET": "hush", "WANDB_API_KEY": "hush", "PYTHONPATH": "/hush"}
    line = mpirun(LaunchRequest(arguments=("train",), workers=2, hosts=("a", "b"), environment=environment))
    assert "hush" not in " ".join(line)
