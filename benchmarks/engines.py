"""Start and step of a job of two workers under each engine, over those under torchrun.

Every round runs the command `shardwise train ... --engine NAME` once for each engine, in turn forwards and backwards;
ratios are those of one round. The start is the time from the command to the end of the first step, with everything that
an engine does before it (a cluster of Ray, an allocation of Slurm). The step is the median of the later steps. Rounds
begin until `--minutes` are over, and there are at least two.

    python -m benchmarks.engines [--engine mpi ...] [--minutes 5]

The engines are those that `make engines` installs; Slurm runs two nodes of this machine, as in the tests (as root).
Ray and Spark start a cluster of their own for each job.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, median, record

REFERENCE = "torchrun"
ENGINES = (REFERENCE, "mpi", "slurm", "ray", "spark")
TARGET = 1.02
"""Largest ratio of a step to that under torchrun."""

STEPS, WARM_STEPS = 300, 20
LEAST_ROUNDS = 2
LONGEST_SECONDS = 120.0
TRAIN = ("train", "image", "--strategy", "dp=2", "--steps", str(STEPS), "--set", "layers=2", "--no-proof", "--quiet")


def measure(engine: str, folder: Path) -> tuple[float, float]:
    """Run one job; return the seconds until its first step is done, and those of its median step."""
    metrics = folder / "metrics.jsonl"
    line = [sys.executable, "-m", "shardwise", *TRAIN, "--out", str(folder), "--engine", engine]
    begin = time.time()
    with tempfile.TemporaryFile("w+") as errors:
        around = os.environ | {"SHARDWISE_CLUSTER": "off"}  # the first job would measure this machine
        process = subprocess.Popen(line, env=around, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors)
        try:
            process.wait(LONGEST_SECONDS)
        finally:
            process.terminate()
            process.wait()
        if process.returncode:
            errors.seek(0)
            raise SystemExit(f"{engine}: exit status {process.returncode}: {errors.read()[-2000:]}")
    steps = [each for each in map(json.loads, metrics.read_text().splitlines()) if "loss" in each]
    return steps[0]["time"] - begin, median([each["seconds"] for each in steps[WARM_STEPS:]])


def rounds(engines: Sequence[str], minutes: float) -> list[dict[str, tuple[float, float]]]:
    """Return for each round the start and the step of each engine."""
    begin, found = time.monotonic(), list[dict[str, tuple[float, float]]]()
    longest = 0.0
    while len(found) < LEAST_ROUNDS or time.monotonic() - begin + longest < 60 * minutes:
        round_begin = time.monotonic()
        with tempfile.TemporaryDirectory(prefix="shardwise-engines-") as folder:
            order = engines if len(found) % 2 == 0 else engines[::-1]
            found.append({engine: measure(engine, Path(folder, engine)) for engine in order})
        longest = max(longest, time.monotonic() - round_begin)
        print(found[-1], file=sys.stderr)
    return found


def row(engine: str, found: Sequence[dict[str, tuple[float, float]]]) -> dict[str, Any]:
    """Return the row of an engine."""
    starts, steps = ([each[engine][part] for each in found] for part in (0, 1))
    ratios = [[each[engine][part] / each[REFERENCE][part] for each in found] for part in (0, 1)]
    return {
        "engine": engine,
        "start_seconds": median(starts),
        "start_ratio": median(ratios[0]),
        "step_seconds": median(steps),
        "step_ratio": median(ratios[1]),
        "lowest": min(ratios[1]),
        "highest": max(ratios[1]),
        "met": "yes" if median(ratios[1]) <= TARGET else "no",
    }


@contextlib.contextmanager
def slurm() -> Iterator[None]:
    """Two nodes of Slurm on this machine, unless SLURM_CONF names a cluster."""
    if "SLURM_CONF" in os.environ:
        yield
        return
    sys.path.append(str(Path(__file__).parents[1] / "tests" / "engines"))
    from slurm_cluster import SlurmCluster

    with tempfile.TemporaryDirectory(prefix="shardwise-slurm-") as folder:
        cluster = SlurmCluster(Path(folder))
        os.environ |= cluster.environment
        try:
            yield
        finally:
            cluster.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    others = [engine for engine in ENGINES if engine != REFERENCE]
    parser.add_argument("--engine", action="append", choices=others, help="one to measure; several may be given")
    parser.add_argument("--minutes", type=float, default=5.0, help="time in which rounds begin")
    options = parser.parse_args()
    before, engines = environment(1), (REFERENCE, *(options.engine or others))
    with slurm() if "slurm" in engines else contextlib.nullcontext():
        found = rounds(engines, options.minutes)
    settings = {"minutes": options.minutes, "rounds": len(found), "steps": STEPS, "load_after": os.getloadavg()[0]}
    record("engines", settings, [row(engine, found) for engine in engines], found, before)


if __name__ == "__main__":
    main()
