"""Predictions for this machine against its runs: recipes x strategies x workers, step time and memory.

python -m benchmarks.prediction [--rounds N] [--steps N] [--recipe NAME ...] [--strategy SPEC ...] [--cluster FILE]

The machine is measured first, as `shardwise calibrate` does it, unless a cluster file is given. Then every run is made
once in each round, one after the other, so that drift of the machine touches all alike; a run's time is the median over
the rounds of its median step. Nothing of the runs goes into the predictions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness import environment, median, record
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.reading import read_cluster
from shardwise.errors import StrategyError
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.run.calibrate import calibrate
from shardwise.run.job import Job, Options, Source, run_job
from shardwise.run.request import check
from shardwise.strategy import Strategy

RECIPES = ("image", "language", "medical")
STRATEGIES = (
    *("single", "dp=2", "fsdp=2", "tp=2", "pp=2"),
    *("dp=4", "fsdp=4", "pp=4", "dp=2,tp=2", "fsdp=2,pp=2", "dp=2,pp=2"),
)
TARGET_TIME, TARGET_MEMORY = 0.10, 0.05
"""Median absolute relative errors that are aimed at."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--recipe", action="append", choices=RECIPES, help="default: all")
    parser.add_argument("--strategy", action="append", help=f"default: {', '.join(STRATEGIES)}")
    parser.add_argument("--name", default="prediction", help="of the files in results/")
    parser.add_argument("--cluster", help="a cluster file of this machine, in place of measuring it")
    options = parser.parse_args()
    before = environment(None)
    cluster = measured_cluster(options.cluster)
    strategies = [Strategy.parse(text) for text in options.strategy or STRATEGIES]
    runs = [run for recipe in options.recipe or RECIPES for run in runs_of(recipe, strategies, cluster)]
    for _ in range(options.rounds):
        for run in runs:
            measure(run, options.steps)
    rows = [row(run) for run in runs]
    settings = {"rounds": options.rounds, "steps": options.steps, **summary(rows)}
    record(options.name, settings, rows, {run["name"]: run["measured"] for run in runs}, before)


def measured_cluster(file: str | None) -> Cluster:
    if file is not None:
        return read_cluster(file)
    cluster = calibrate()
    assert cluster is not None  # there is no outer launcher
    return cluster


def runs_of(recipe: str, strategies: Sequence[Strategy], cluster: Cluster) -> Iterable[dict[str, Any]]:
    """The runs of a recipe that can be, with their predictions."""
    source = Source(workload=recipe)
    workload = source.load()
    profiles = profiles_on(workload, cluster)
    for strategy in strategies:
        try:
            check(workload, strategy)
        except StrategyError:
            continue
        prediction = simulate(profiles, strategy, cluster)
        yield {"name": f"{recipe} {strategy}", "recipe": recipe, "source": source, "strategy": strategy} | {
            "prediction": prediction,
            "measured": [],
        }


def measure(run: dict[str, Any], steps: int) -> None:
    job = Job(source=run["source"], strategy=run["strategy"], options=Options(steps=steps, quiet=True))
    found = run_job(job).summary
    run["measured"].append([found["step_seconds"], found["memory_bytes"]])


def row(run: dict[str, Any]) -> dict[str, Any]:
    prediction = run["prediction"]
    seconds, memory = (median(values) for values in zip(*run["measured"], strict=True))
    return {
        "recipe": run["recipe"],
        "strategy": str(run["strategy"]),
        "workers": run["strategy"].workers,
        "predicted ms": 1e3 * prediction.step_seconds,
        "measured ms": 1e3 * seconds,
        "error": prediction.step_seconds / seconds - 1,
        "predicted MiB": prediction.memory.total / 2**20,
        "measured MiB": memory / 2**20,
        "memory error": prediction.memory.total / memory - 1,
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median absolute errors over the runs of 2 and 4 workers, which the targets are about, and over all."""
    several = [each for each in rows if each["workers"] > 1] or rows
    return {
        "median error of time, 2 and 4 workers": median([abs(each["error"]) for each in several]),
        "median error of memory, 2 and 4 workers": median([abs(each["memory error"]) for each in several]),
        "median error of time, all": median([abs(each["error"]) for each in rows]),
        "median error of memory, all": median([abs(each["memory error"]) for each in rows]),
        "aimed at, time": TARGET_TIME,
        "aimed at, memory": TARGET_MEMORY,
    }


if __name__ == "__main__":
    main()
