"""Worth of three habits of workers on a CPU.

Memory is kept, the loading thread computes alone, and threads that wake up do not interrupt others.

    python -m benchmarks.hosting [--rounds N] [--steps N]

Each round trains with all habits and without each, one after the other; what is compared are the
medians of their steps, as ratios within a round.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from benchmarks.harness import environment, median, record
from shardwise.launch.local import run_local
from shardwise.strategy import Strategy

RUNS = (
    ("image", "single"),
    ("language", "single"),
    ("medical", "single"),
    ("image", "dp=2"),
    ("language", "dp=2"),
    ("medical", "dp=2"),
    ("image", "fsdp=2"),
    ("medical", "fsdp=2"),
    ("image", "tp=2"),
    ("language", "tp=2"),
    ("medical", "pp=2"),
    ("language", "pp=2"),
    ("image", "dp=4"),
    ("language", "dp=2,tp=2"),
    ("language", "fsdp=4"),
    ("language", "pp=4"),
)
VARIANTS = ("with all", "memory given back", "loading with a team", "threads interrupted")
WARMUP = 4


def trained(recipe: str, strategy: str, steps: int, variant: str) -> list[float]:
    """Seconds of each step, on a worker."""
    from shardwise.parallel.program import Program
    from shardwise.workload import data
    from shardwise.workload.load import load_workload

    if variant == "loading with a team":
        vars(data)["_compute_alone"] = lambda pool: None
    if variant == "threads interrupted":
        interrupted()
    program = Program.build(load_workload(recipe), Strategy.parse(strategy))
    found: list[float] = []
    epoch = 0
    while len(found) < steps:
        for share in program.loader().shares(epoch):
            start = time.perf_counter()
            program.step_share(share)
            found.append(time.perf_counter() - start)
            if len(found) == steps:
                break
        epoch += 1
    return found


def interrupted() -> None:
    """All threads of this worker, and those they start, as the system schedules them without being asked."""
    for thread in os.listdir("/proc/self/task"):
        os.sched_setscheduler(int(thread), os.SCHED_OTHER, os.sched_param(0))


@contextmanager
def surroundings(variant: str) -> Iterator[None]:
    """An environment in which a person has chosen an allocator, the usual one, where memory is to be given back."""
    if variant == "memory given back":
        os.environ["LD_PRELOAD"] = ""
    try:
        yield
    finally:
        if variant == "memory given back":
            del os.environ["LD_PRELOAD"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24)
    options = parser.parse_args()
    before = environment(threads=None)
    rows: list[dict[str, Any]] = []
    measured: dict[str, list[list[float]]] = {}
    for recipe, strategy in RUNS:
        name, workers = f"{recipe} {strategy}", Strategy.parse(strategy).workers
        measured[name] = []
        for _ in range(options.rounds):
            seconds = []
            for variant in VARIANTS:
                with surroundings(variant):
                    steps = run_local(trained, (recipe, strategy, options.steps, variant), workers=workers)
                seconds.append(median(steps[WARMUP:]))
            measured[name].append(seconds)
        kept, *others = (
            median([values[0] / values[number] for values in measured[name]]) for number in range(len(VARIANTS))
        )
        assert kept == 1.0
        milliseconds = 1e3 * median([values[0] for values in measured[name]])
        rows.append(
            {"recipe": recipe, "strategy": strategy, "ms with all": milliseconds}
            | {f"over {variant}": ratio for variant, ratio in zip(VARIANTS[1:], others, strict=True)}
        )
    record("hosting", {"rounds": options.rounds, "steps": options.steps}, rows, measured, before)


if __name__ == "__main__":
    main()
