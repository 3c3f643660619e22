"""Fits the few constants of the predictor to all published runs together, and says how well each is determined.

    python -m benchmarks.fit [--write] [--no-crossing] [--steps N] [--rounds N]

It begins with values that one would take without any fit (START), each with how far it may be off (UNCERTAIN); the less
the runs say about a constant, the nearer it stays. What falls is the mean over groups of the mean absolute logarithm of
predicted over measured, groups weighted by how many rows they have up to a point, with the all-reduces of
collectives.csv as a group of their own. No constant belongs to a row or a source. Steps are those of Levenberg and
Marquardt on residuals that are weighted anew each time, so that their sum of squares is a sum of absolute values. The
slopes of residuals are finite differences where a fit begins, and secants from there (Broyden 1965; Schubert 1970).

Cross-validation fits anew from START without one group, and looks at that group then: what a reader may expect of runs
that nobody fitted. `--write` puts the values into predict/hardware/constants.json; results go to benchmarks/results.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.harness import environment, record
from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.hardware import constants as module
from shardwise.predict.hardware.constants import Constants, constants, using
from shardwise.predict.hardware.network import collective_seconds
from shardwise.predict.published.row import PublishedRun, read
from shardwise.predict.published.validate import read_rows

Array = npt.NDArray[np.float64]

PUBLISHED = Path(__file__).parents[1] / "tests" / "published"
CONSTANTS = Path(module.__file__).with_name("constants.json")

START: dict[str, float] = {
    "sustained_ampere": 0.85,
    "sustained_hopper": 0.75,
    "sustained_blackwell": 0.75,
    "power_exponent": 0.7,
    "sustained_fp8": 0.9,
    "sustained_fp4": 0.8,
    "sustained_tf32": 0.85,
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
    "link_share": 0.9,
    "link_copy": 0.2,
    "network_share": 0.85,
    "hosted_share": 0.6,
    "collective_start": 20e-6,
    "link_hop": 3e-6,
    "network_hop": 10e-6,
    "overlap_loss": 0.3,
}
"""Starting values from papers, datasheets and experience; constants that are not here are not fitted to times."""

UNCERTAIN: dict[str, float] = {
    **dict.fromkeys(("sustained_ampere", "sustained_hopper", "sustained_blackwell", "sustained_fp8"), 0.1),
    **dict.fromkeys(("memory_share", "link_share", "network_share"), 0.1),
    **dict.fromkeys(("attention_forward", "attention_backward", "attention_hopper", "attention_fused"), 0.2),
    **dict.fromkeys(("sustained_fp4", "power_exponent"), 0.2),
    "hosted_share": 0.3,
}
"""Uncertainty of values of START, as the standard deviation of a logarithm. Shares of a datasheet's rate were
measured by many, and differ by a tenth; those of single kernels or of few devices by two or three tenths."""

VERY_UNCERTAIN = 0.7
"""Uncertainty of all other constants, which may be half or twice their start: latencies, times of hosts, overheads."""

LEAST: dict[str, float] = {"network_hop": 1e-6, "attention_softmax": 2.0, "link_hop": 0.5e-6}
"""Smallest values of constants that cannot be zero."""

MOST: dict[str, float] = {
    **dict.fromkeys(("sustained_ampere", "sustained_hopper", "sustained_blackwell"), 1.0),
    **dict.fromkeys(("partial_wave", "link_share", "network_share", "hosted_share", "overlap_loss"), 1.0),
    **dict.fromkeys(("attention_forward", "attention_backward"), 0.95),
    "memory_share": 0.92,
    "power_exponent": 0.8,
    "prologue": 192.0,
    "kernel_start": 5e-6,
    "product_start": 10e-6,
}
"""Shares do not exceed the whole; kernels do not take longer to start than traces of them show."""

NAMED = {"vTrain multi": 2.0, "vTrain single node": 2.0, "BLOOM prequel": 2.0}
"""Groups that hold bad configurations too, by which a choice can be judged: they weigh twice."""

WEIGHED_ROWS = 10
"""Groups of so many rows have half the weight of one with very many."""

LOOKED_AT, LOOKED_AT_CROSSING = 60, 16
"""Rows of a group that are looked at while constants are sought, evenly spaced; errors are of all rows."""

SMALL_ERROR = 0.01
"""Logarithmic errors below this count as squares, which have no corner."""

HELD = 0.001
"""Weight of the constants' own deviations, squared and in units of `UNCERTAIN`, beside the error of the runs.

The usual error (0.06) divided by the number of groups (16) would be the weight if groups erred independently, with
exponential tails, and START with normal ones: what falls is then the negative logarithm of a probability. With all of
it the error of the fit rises above 6%, hence a quarter of it. Twice and four times as much were tried too, on fewer
rows, and had held-out errors of 9.4% and 9.2%, fitted ones of 6.1% and 6.2%. `UNCERTAIN` was settled after a look at
the constants that drift when a group is left out, so that the held-out errors are not quite blind."""

DIFFERENCE, LONGEST, ENOUGH = 0.02, 0.4, 1e-5
"""Step of finite differences; longest step of a logarithm; fall of the objective that is not worth another step."""

TRIES = 6
"""Dampings of one step, before a fit ends."""

CROSSING_STEPS = 8
"""Steps of each fit of the cross-validation, from slopes at START."""

NEARBY = 0.1
"""Relative change by which sensitivity is told."""

NODES = {"A100 single node NVSwitch": "dgx-a100-80"}
"""Hardware of collectives.csv -> node of the catalogue. The V100 of that file are said to have NVSwitch, but two of
them reach one sixth of the bandwidth of eight, as in a cube of direct links."""


@dataclass(frozen=True)
class Data:
    """Runs by group, and all-reduces by hardware: (collective, cluster, seconds)."""

    runs: Mapping[str, Sequence[PublishedRun]]
    collectives: Mapping[str, Sequence[tuple[Collective, Cluster, float]]]

    def without(self, group: str) -> Data:
        return Data({name: rows for name, rows in self.runs.items() if name != group}, self.collectives)

    def thinned(self, most: int) -> Data:
        runs = {name: rows[:: -(-len(rows) // most)] for name, rows in self.runs.items()}
        return Data(runs, {name: rows[:: -(-len(rows) // most)] for name, rows in self.collectives.items()})


def load() -> Data:
    runs: dict[str, list[PublishedRun]] = {}
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
    with using(numbers):
        found = {
            group: [math.log(seconds(run) / run.step_seconds) for run in runs] for group, runs in data.runs.items()
        }
    for node, entries in data.collectives.items():
        found[collectives_of(node)] = [
            math.log(collective_seconds(collective, cluster, numbers) / seconds)
            for collective, cluster, seconds in entries
        ]
    return found


def collectives_of(node: str) -> str:
    """Return the name of the group of a node's all-reduces."""
    return f"all-reduces of {node}"


def seconds(run: PublishedRun) -> float:
    """Predict the seconds of a step with the constants in use."""
    run.profile.memo.forget()
    return costs_of(run.profile, run.strategy, run.cluster).step_seconds


def weight_of(group: str, rows: int) -> float:
    return NAMED.get(group, 1.0) * rows / (rows + WEIGHED_ROWS)


def mean_of_groups(data: Data, numbers: Constants) -> float:
    """Return the errors that validate states for some runs: predicted / measured - 1."""
    found = errors(Data(data.runs, {}), numbers)
    return statistics.fmean(statistics.fmean(abs(math.expm1(value)) for value in rows) for rows in found.values())


def residuals_of(data: Data, numbers: Constants) -> Array:
    return np.concatenate([np.array(values) for values in errors(data, numbers).values()])


def shares_of(data: Data) -> Array:
    """Return the share of each residual in the objective."""
    counts = {group: len(rows) for group, rows in data.runs.items()}
    counts |= {node: len(rows) for node, rows in data.collectives.items()}
    shares = np.concatenate([np.full(count, weight_of(group, count) / count) for group, count in counts.items()])
    return np.asarray(shares / shares.sum())


def slopes_of(data: Data, numbers: Constants) -> dict[str, Array]:
    """Return by group how each residual changes with the logarithm of each constant, by finite differences."""
    base, place, columns = errors(data, numbers), logarithms(numbers), []
    for column in range(len(place)):
        beside = place.copy()
        beside[column] -= DIFFERENCE  # downwards, where no bound is near
        columns.append(errors(data, moved(numbers, beside)))
    return {
        group: np.stack([np.subtract(values, each[group]) / DIFFERENCE for each in columns], axis=1)
        for group, values in base.items()
    }


def fit(data: Data, start: Constants, slopes: Mapping[str, Array], steps: int) -> tuple[Constants, float]:
    """Return constants with a smaller objective, and the objective: damped least squares (Marquardt 1963).

    Args:
        data: the runs.
        start: constants to begin with.
        slopes: slopes of the residuals there, by group, of these groups at least.
        steps: most steps.
    """
    pull, origin, shares = HELD * WIDTHS**-2, logarithms(begin()), shares_of(data)
    best, residuals = start, residuals_of(data, start)
    matrix = np.concatenate([slopes[group] for group in (*data.runs, *map(collectives_of, data.collectives))])
    known, damping = matrix != 0, 1e-3

    def objective(numbers: Constants, off: Array) -> float:
        return float(shares @ np.abs(off) + 0.5 * pull @ (logarithms(numbers) - origin) ** 2)

    value = objective(best, residuals)
    for _ in range(steps):
        before, place = value, logarithms(best)
        weights = shares / np.maximum(np.abs(residuals), SMALL_ERROR)
        for _ in range(TRIES):
            gradient = matrix.T @ (weights * residuals) + pull * (place - origin)
            curvature = (matrix * weights[:, None]).T @ matrix + np.diag(pull)
            scaled = curvature + damping * np.diag(np.diag(curvature))
            tried = moved(best, place + np.clip(np.linalg.solve(scaled, -gradient), -LONGEST, LONGEST))
            step = known * (logarithms(tried) - place)
            found = residuals_of(data, tried)
            lengths = np.maximum((step**2).sum(axis=1), 1e-12)
            matrix += step * ((found - residuals - (matrix * step).sum(axis=1)) / lengths)[:, None]
            if objective(tried, found) < value:
                best, residuals, value, damping = tried, found, objective(tried, found), damping / 3
                break
            damping *= 4
        if before - value < ENOUGH:
            break
    return best, value


def fit_all(data: Data, rounds: int, steps: int) -> Constants:
    """Fit to all runs, with slopes measured anew in each round."""
    best, value = begin(), math.inf
    for number in range(rounds):
        found, reached = fit(data, best, slopes_of(data, best), steps)
        say(f"round {number + 1}: {reached:.5f}, mean over groups {mean_of_groups(data, found):.4f}")
        if value - reached < ENOUGH:
            break
        best, value = found, reached
    return best


def logarithms(numbers: Constants) -> Array:
    return np.log([getattr(numbers, name) for name in START])


def moved(numbers: Constants, place: Array) -> Constants:
    """Constants with these logarithms, within their bounds."""
    values = {
        name: max(LEAST.get(name, 0.0), min(math.exp(value), MOST.get(name, math.inf)))
        for name, value in zip(START, place, strict=True)
    }
    return replace(numbers, **values)


WIDTHS: Array = np.array([UNCERTAIN.get(name, VERY_UNCERTAIN) for name in START])
"""`UNCERTAIN` of each constant of START."""


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


def held_out(data: Data, steps: int) -> dict[str, float]:
    """Group -> its mean absolute error with constants that were fitted without it."""
    thinned, result = data.thinned(LOOKED_AT_CROSSING), {}
    slopes = slopes_of(thinned, begin())
    for group in data.runs:
        numbers, _ = fit(thinned.without(group), begin(), slopes, steps)
        left = errors(Data({group: data.runs[group]}, {}), numbers)[group]
        result[group] = statistics.fmean(abs(math.expm1(value)) for value in left)
        say(f"without {group}: {result[group]:.4f} there")
    return result


def write(numbers: Constants, around: Mapping[str, tuple[float, float]], summary: Mapping[str, Any]) -> None:
    """constants.json: values, and how well each is determined."""
    document = json.loads(CONSTANTS.read_text(encoding="utf-8"))
    known: dict[str, dict[str, Any]] = document["constants"]
    for field in fields(Constants):
        entry = known[field.name]
        if field.name in START:
            entry["value"] = float(f"{getattr(numbers, field.name):.4g}")
            entry["start"] = START[field.name]
            entry["rise_below"], entry["rise_above"] = (round(value, 5) for value in around[field.name])
    document["fit"] = {**document.get("fit", {}), **summary}
    CONSTANTS.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def say(text: str) -> None:
    print(text, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the values into predict/hardware/constants.json")
    parser.add_argument("--no-crossing", action="store_true", help="leave the cross-validation out")
    parser.add_argument("--steps", type=int, default=12, help="of each round, at most")
    parser.add_argument("--rounds", type=int, default=3, help="of the fit to all runs, at most")
    options = parser.parse_args()
    before, began = environment(threads=1), time.perf_counter()
    data = load()
    numbers = fit_all(data.thinned(LOOKED_AT), options.rounds, options.steps)
    around = sensitivity(data, numbers)
    inside = {
        group: statistics.fmean(abs(math.expm1(value)) for value in values)
        for group, values in errors(Data(data.runs, {}), numbers).items()
    }
    outside = {} if options.no_crossing else held_out(data, CROSSING_STEPS)
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
    record(
        "fit",
        {"steps": options.steps, "rounds": options.rounds, "mean over groups": summary["mean_of_groups"]},
        rows,
        measured,
        before,
    )
    for group, value in inside.items():
        print(f"{group}: {value:.4f}" + (f", held out {outside[group]:.4f}" if outside else ""))


if __name__ == "__main__":
    main()
