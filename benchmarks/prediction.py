"""Predictions for this machine against its runs: recipes x strategies x workers, step time and memory.

python -m benchmarks.prediction [--rounds N] [--steps N] [--recipe NAME ...] [--strategy SPEC ...] [--cluster FILE]

In each round the machine is measured before the runs of each recipe, as `shardwise calibrate` does it, unless a cluster
file is given: it is faster in some hours than in others. Every run is predicted by the measurement before it; what is
told are the medians over the rounds. Nothing of the runs goes into the predictions.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from typing import Any

from benchmarks.harness import environment, median, record
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.toml_reader import read_cluster
from shardwise.commands.request import check
from shardwise.errors import StrategyError
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.run.calibration.calibrate import calibrate
from shardwise.run.training.execute import run_job
from shardwise.run.training.job import Job, Options
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

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
    strategies = [Strategy.parse(text) for text in options.strategy or STRATEGIES]
    runs = [run for recipe in options.recipe or RECIPES for run in runs_of(recipe, strategies)]
    for _ in range(options.rounds):
        for recipe in options.recipe or RECIPES:
            cluster = measured_cluster(options.cluster)
            own = [run for run in runs if run["recipe"] == recipe]
            profiles = profiles_on(own[0]["source"].load(), cluster)
            for run in own:
                prediction = simulate(profiles, run["strategy"], cluster)
                run["predicted"].append([prediction.step_seconds, prediction.memory.total])
                measure(run, options.steps)
    rows = [row(run) for run in runs]
    settings = {"rounds": options.rounds, "steps": options.steps, **summary(rows)}
    both = {run["name"]: {"predicted": run["predicted"], "measured": run["measured"]} for run in runs}
    record(options.name, settings, rows, both, before)


def measured_cluster(file: str | None) -> Cluster:
    if file is not None:
        return read_cluster(file)
    cluster = calibrate(quiet=True)
    assert cluster is not None  # there is no outer launcher
    return cluster


def runs_of(recipe: str, strategies: Sequence[Strategy]) -> Iterable[dict[str, Any]]:
    """The runs of a recipe that can be."""
    source = Source(workload=recipe)
    workload = source.load()
    for strategy in strategies:
        try:
            check(workload, strategy)
        except StrategyError:
            continue
        yield {"name": f"{recipe} {strategy}", "recipe": recipe, "source": source, "strategy": strategy} | {
            "predicted": [],
            "measured": [],
        }


def measure(run: dict[str, Any], steps: int) -> None:
    job = Job(source=run["source"], strategy=run["strategy"], options=Options(steps=steps, quiet=True))
    found = run_job(job).summary
    run["measured"].append([found["step_seconds"], found["memory_bytes"]])


def row(run: dict[str, Any]) -> dict[str, Any]:
    seconds, memory = (median(values) for values in zip(*run["measured"], strict=True))
    foreseen, foreseen_memory = (median(values) for values in zip(*run["predicted"], strict=True))
    pairs = zip(run["predicted"], run["measured"], strict=True)
    time_error, memory_error = (
        median(ratios) - 1
        for ratios in zip(*([p / m for p, m in zip(*pair, strict=True)] for pair in pairs), strict=True)
    )
    return {
        "recipe": run["recipe"],
        "strategy": str(run["strategy"]),
        "workers": run["strategy"].workers,
        "predicted ms": 1e3 * foreseen,
        "measured ms": 1e3 * seconds,
        "error": time_error,
        "predicted MiB": foreseen_memory / 2**20,
        "measured MiB": memory / 2**20,
        "memory error": memory_error,
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
