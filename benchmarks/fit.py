"""Fits the few constants of the predictor to all published runs together, and says how well each is determined.

    python -m benchmarks.fit [--write] [--no-crossing] [--sweeps N]

Coordinate descent from values that one would take without any fit (START): a step up and a step down for each constant
in turn, larger after a success and smaller after a failure. What falls is the mean over groups of the mean absolute
logarithm of predicted over measured, groups weighted by how many rows they have up to a point, with the all-reduces of
collectives.csv as groups of their own. No constant belongs to a row or a source.

Cross-validation fits anew from START without one group, and looks at that group then: what a reader may expect of runs
that nobody fitted. `--write` puts the values into predict/constants.json; results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, record
from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict import constants as module
from shardwise.predict.constants import Constants, constants
from shardwise.predict.network import collective_seconds
from shardwise.predict.published.row import Run, read
from shardwise.predict.published.validate import read_rows
from shardwise.predict.transformer.step import Clock, predict

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
CONSTANTS = Path(module.__file__).with_name("constants.json")

START: dict[str, float] = {
    "sustained_default": 0.8,
    "sustained_ampere": 0.85,
    "sustained_hopper": 0.75,
    "sustained_blackwell": 0.75,
    "power_exponent": 0.7,
    "sustained_fp8": 0.9,
    "sustained_fp4": 0.8,
    "sustained_single": 0.85,
    "tile_overhead": 8.0,
    "prologue": 64.0,
    "partial_wave": 1.0,
    "memory_share": 0.85,
    "kernel_start": 3e-6,
    "product_start": 5e-6,
    "attention_forward": 0.75,
    "attention_backward": 0.6,
    "attention_softmax": 20.0,
    "attention_hopper": 0.6,
    "attention_fused": 0.9,
    "host_kernel": 30e-6,
    "host_collective": 50e-6,
    "link_share": 0.75,
    "network_share": 0.85,
    "hosted_share": 0.6,
    "collective_start": 20e-6,
    "link_hop": 3e-6,
    "network_hop": 10e-6,
    "overlap_loss": 0.3,
}
"""What papers, datasheets and experience say before any fit; constants that are not here are not fitted to times."""

MOST: dict[str, float] = {
    **dict.fromkeys(("sustained_default", "sustained_ampere", "sustained_hopper", "sustained_blackwell"), 1.0),
    **dict.fromkeys(
        ("memory_share", "partial_wave", "link_share", "network_share", "hosted_share", "overlap_loss"), 1.0
    ),
    **dict.fromkeys(("attention_forward", "attention_backward"), 1.0),
    "kernel_start": 5e-6,
    "product_start": 10e-6,
}
"""Shares do not exceed the whole."""

WEIGHED_ROWS = 10
"""Groups of so many rows have half the weight of one with very many."""

EVERY = 6
"""Of the largest group, which is a grid, every so many rows are looked at while constants are sought."""

FIRST_STEP, LAST_STEP, GROWTH = 0.1, 0.004, 1.6
NEARBY = 0.1
"""Relative change by which sensitivity is told."""

NODES = {"A100 single node NVSwitch": "dgx-a100-80"}
"""Hardware of collectives.csv -> node of the catalogue. The V100 of that file are said to have NVSwitch, but two of
them reach one sixth of the bandwidth of eight, as in a cube of direct links."""


@dataclass(frozen=True)
class Data:
    """Runs by group, and all-reduces by hardware: (collective, cluster, seconds)."""

    runs: Mapping[str, Sequence[Run]]
    collectives: Mapping[str, Sequence[tuple[Collective, Cluster, float]]]

    def without(self, group: str) -> Data:
        return Data({name: rows for name, rows in self.runs.items() if name != group}, self.collectives)

    def thinned(self) -> Data:
        largest = max(self.runs, key=lambda name: len(self.runs[name]))
        return Data({**self.runs, largest: self.runs[largest][::EVERY]}, self.collectives)


def load() -> Data:
    runs: dict[str, list[Run]] = {}
    for line, row in read_rows(PUBLISHED / "runs.csv"):
        run = read(row, line)
        runs.setdefault(run.group, []).append(run)
    collectives: dict[str, list[tuple[Collective, Cluster, float]]] = {}
    with (PUBLISHED / "collectives.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            node = NODES.get(row["hw"])
            if node and row["collective"] == "all_reduce" and row["time_ms"]:
                group = Group(int(row["n_gpus"]))
                entry = (Collective("all_reduce", int(row["size_bytes"]), group), float(row["time_ms"]) / 1e3)
                collectives.setdefault(node, []).append((entry[0], catalogue.cluster(node), entry[1]))
    return Data(runs, collectives)


def errors(data: Data, numbers: Constants) -> dict[str, list[float]]:
    """Group -> logarithms of predicted over measured."""
    clocks: dict[str, Clock] = {}
    found: dict[str, list[float]] = {}
    for group, runs in data.runs.items():
        found[group] = []
        for run in runs:
            device = run.cluster.device(0)
            clock = clocks.setdefault(device.name, Clock(run.cluster, device, numbers))
            predicted = predict(run.sizes, run.setup, run.cluster, numbers, clock).step_seconds
            found[group].append(math.log(predicted / run.step_seconds))
    for node, entries in data.collectives.items():
        found[f"all-reduces of {node}"] = [
            math.log(collective_seconds(collective, cluster, numbers) / seconds)
            for collective, cluster, seconds in entries
        ]
    return found


def objective(data: Data, numbers: Constants) -> float:
    total = weight = 0.0
    for values in errors(data, numbers).values():
        share = len(values) / (len(values) + WEIGHED_ROWS)
        total += share * statistics.fmean(abs(value) for value in values)
        weight += share
    return total / weight


def mean_of_groups(data: Data, numbers: Constants) -> float:
    """Of runs alone, in the errors that validate states: predicted / measured - 1."""
    found = errors(Data(data.runs, {}), numbers)
    return statistics.fmean(statistics.fmean(abs(math.expm1(value)) for value in rows) for rows in found.values())


def fit(data: Data, start: Constants, sweeps: int, say: Callable[[str], None] = lambda text: None) -> Constants:
    """Coordinate descent."""
    steps = dict.fromkeys(START, FIRST_STEP)
    best, value = start, objective(data, start)
    for sweep in range(sweeps):
        for name in START:
            for sign in (1, -1):
                tried = replace(best, **{name: moved(best, name, sign * steps[name])})
                found = objective(data, tried)
                if found < value - 1e-7:
                    best, value = tried, found
                    steps[name] = min(0.3, steps[name] * GROWTH)
                    break
            else:
                steps[name] /= 2
        say(f"sweep {sweep + 1}: {value:.5f}, mean over groups {mean_of_groups(data, best):.4f}")
        if max(steps.values()) < LAST_STEP:
            break
    return best


def moved(numbers: Constants, name: str, step: float) -> float:
    """A constant multiplied by 1 + step, within its bounds."""
    value: float = getattr(numbers, name)
    return min(value * (1 + step if step > 0 else 1 / (1 - step)), MOST.get(name, math.inf))


def begin() -> Constants:
    return replace(constants(), **START)


def sensitivity(data: Data, numbers: Constants) -> dict[str, tuple[float, float]]:
    """Constant -> by how much the mean over groups rises with a tenth less and a tenth more of it."""
    base = mean_of_groups(data, numbers)
    return {
        name: (
            mean_of_groups(data, replace(numbers, **{name: getattr(numbers, name) * (1 - NEARBY)})) - base,
            mean_of_groups(data, replace(numbers, **{name: getattr(numbers, name) * (1 + NEARBY)})) - base,
        )
        for name in START
    }


def held_out(data: Data, sweeps: int, say: Callable[[str], None]) -> dict[str, float]:
    """Group -> its mean absolute error with constants that were fitted without it."""
    result = {}
    for group in data.runs:
        numbers = fit(data.without(group).thinned(), begin(), sweeps)
        left = errors(Data({group: data.runs[group]}, {}), numbers)[group]
        result[group] = statistics.fmean(abs(math.expm1(value)) for value in left)
        say(f"without {group}: {result[group]:.4f} there")
    return result


def write(numbers: Constants, around: Mapping[str, tuple[float, float]], summary: Mapping[str, Any]) -> None:
    """constants.json: values, and how well each is determined."""
    document = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    known: dict[str, dict[str, Any]] = document["constants"]
    for field in fields(Constants):
        entry = known.setdefault(field.name, {"origin": "fitted", "source": ""})
        if field.name in START:
            entry["value"] = float(f"{getattr(numbers, field.name):.4g}")
            entry["start"] = START[field.name]
            entry["rise_below"], entry["rise_above"] = (round(value, 5) for value in around[field.name])
    document["fit"] = {**document.get("fit", {}), **summary}
    CONSTANTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the values into predict/constants.json")
    parser.add_argument("--no-crossing", action="store_true", help="leave the cross-validation out")
    parser.add_argument("--sweeps", type=int, default=40, help="over all constants, at most")
    options = parser.parse_args()
    before, began = environment(threads=1), time.perf_counter()
    data = load()
    numbers = fit(data.thinned(), begin(), options.sweeps, print)
    around = sensitivity(data, numbers)
    inside = {
        group: statistics.fmean(abs(math.expm1(value)) for value in values)
        for group, values in errors(Data(data.runs, {}), numbers).items()
    }
    outside = {} if options.no_crossing else held_out(data, options.sweeps, print)
    summary: dict[str, Any] = {
        "rows": sum(map(len, data.runs.values())),
        "mean_of_groups": round(mean_of_groups(data, numbers), 5),
    }
    if outside:
        summary["held_out"] = {group: round(value, 5) for group, value in outside.items()}
        summary["held_out_mean_of_groups"] = round(statistics.fmean(outside.values()), 5)
    if options.write:
        write(numbers, around, summary)
    rows = [
        {
            "constant": name,
            "value": getattr(numbers, name),
            "start": START[name],
            "error with 10% less": f"{around[name][0]:+.2%}",
            "error with 10% more": f"{around[name][1]:+.2%}",
        }
        for name in START
    ]
    measured = {"groups": inside, "held out": outside, "minutes": round((time.perf_counter() - began) / 60, 1)}
    record("fit", {"sweeps": options.sweeps, "mean over groups": summary["mean_of_groups"]}, rows, measured, before)
    for group, value in inside.items():
        print(f"{group}: {value:.4f}" + (f", held out {outside[group]:.4f}" if outside else ""))


if __name__ == "__main__":
    main()
