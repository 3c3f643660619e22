"""Ways to start `shardwise train` on several workers: inside an engine, and by `--engine`."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

SECONDS = 300.0
"""Longest time of one job, on a machine that has other work, too."""

SHARDWISE = (sys.executable, "-m", "shardwise")


@dataclass(frozen=True)
class Way:
    """One way to start workers.

    Attributes:
        name: name of the test.
        engine: name of the engine, as a worker's rank has it.
        line: number of workers, arguments of `shardwise` -> command line.
        outside: `--engine` starts the job, so that exit statuses are those of the command.
        tell: tells the job to end after a checkpoint.
    """

    name: str
    engine: str
    line: Callable[[int, Sequence[str]], list[str]]
    outside: bool
    tell: Callable[[subprocess.Popen[str]], None]

    def __str__(self) -> str:
        return self.name


def by_engine(engine: str) -> Callable[[int, Sequence[str]], list[str]]:
    return lambda _, arguments: [*SHARDWISE, *arguments, "--engine", engine]


def torchrun(*options: str) -> Callable[[int, Sequence[str]], list[str]]:
    return lambda count, arguments: [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(count)),
        *options,
        *("-m", "shardwise", *arguments),
    ]


def mpirun(count: int, arguments: Sequence[str]) -> list[str]:
    return ["mpirun", "--allow-run-as-root", "--oversubscribe", "-n", str(count), *SHARDWISE, *arguments]


def srun(count: int, arguments: Sequence[str]) -> list[str]:
    return ["srun", "-N", "2", "-n", str(count), *SHARDWISE, *arguments]


def terminate(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGTERM)


def pass_usr2(process: subprocess.Popen[str]) -> None:
    process.send_signal(signal.SIGUSR2)  # mpirun passes it on; on SIGTERM it leaves its workers a second


def preempt(_: subprocess.Popen[str]) -> None:
    """Send the tasks what a preemption sends them first."""
    steps = subprocess.run(["squeue", "-s", "-h", "-o", "%i"], capture_output=True, text=True, check=True).stdout
    (step,) = [each for each in steps.split() if each.partition(".")[2].isdigit()]
    subprocess.run(["scancel", "--signal=TERM", step], check=True)


STATIC = ("--rdzv-backend", "static", "--master-addr", "127.0.0.1", "--master-port", "29517")
ELASTIC = ("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "--max-restarts", "0")

STATIC_WAY = Way("torchrun static", "torchrun", torchrun(*STATIC), False, terminate)

WAYS = (
    Way("torchrun elastic", "torchrun", torchrun(*ELASTIC), False, terminate),
    Way("--engine torchrun", "torchrun", by_engine("torchrun"), True, terminate),
    Way("mpirun", "mpi", mpirun, False, pass_usr2),
    Way("--engine mpi", "mpi", by_engine("mpi"), True, terminate),
    Way("srun", "slurm", srun, False, preempt),
    Way("--engine slurm", "slurm", by_engine("slurm"), True, terminate),
    Way("--engine ray", "ray", by_engine("ray"), True, terminate),
    Way("--engine spark", "spark", by_engine("spark"), True, terminate),
)

THREE = [
    *(*SHARDWISE, "train", "work.py:small", "--engine", "torchrun", "--strategy", "fsdp=3"),
    *("--steps", "2", "--out", "out", "--quiet", "--no-proof"),
]
"""Command line of a run on three workers."""


def start(way: Way, count: int, *arguments: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        way.line(count, ("train", "work.py:small", *arguments)),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def run(way: Way, count: int, *arguments: str) -> subprocess.CompletedProcess[str]:
    process = start(way, count, *arguments)
    try:
        output, errors = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        output, errors = process.communicate()
        errors += "\nTIMED OUT"
    return subprocess.CompletedProcess(process.args, process.returncode, output, errors)


def await_steps(folder: Path, process: subprocess.Popen[str], steps: int = 2) -> None:
    """Wait until the run in `folder` has done so many steps."""
    metrics = folder / "metrics.jsonl"
    end = time.monotonic() + SECONDS
    while not metrics.exists() or metrics.read_text().count("\n") < steps:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end
        time.sleep(0.05)


def processes_with(mark: str) -> list[int]:
    """Living processes that carry `mark` in their environment, but for this one."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            marked = mark.encode() in (process / "environ").read_bytes()
            if marked and state != "Z" and int(process.name) != os.getpid():
                found.append(int(process.name))
    return found


def await_no_process(mark: str, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while (left := processes_with(mark)) and time.monotonic() < end:
        time.sleep(0.1)
    assert left == [], [Path(f"/proc/{each}/cmdline").read_bytes() for each in left]
