"""Measure what means that change training cost in learning, and save on slow links.

    python -m benchmarks.learning [--recipe NAME] [--means MEANS] [--link MBIT] [--seeds N] [--slow TIMES]

All but --seeds can be repeated. Two measurements of each recipe, on 2 workers:

    learning    the recipe is trained for STEPS steps on local workers, under data parallelism and under each means,
                with several seeds: the loss after as many samples. The link does not change it
    link        the same programs take steps on two hosts (network namespaces) with a shaped link between them: the
                seconds of a step, and the bytes that one host sends in it, as its network device counts them. With
                `--slow 1` the second host sleeps for as long as a step takes without the link

Time to the loss is the number of steps after which a means reaches the loss that data parallelism ends with (its mean
over the seeds, plus their spread), times the seconds of its step. A means that does not reach it has none.

Needs root, `ip`, `tc` and two cores for the links.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, median, record
from benchmarks.hosts import HOSTS, NoHosts, device, hosts, run_on_hosts
from shardwise.planner import means as planner

RECIPES = ("image", "language", "medical")
PLAIN = "dp=2"
MEANS = tuple(means for means in planner.MEANS if not means.startswith("ps="))
"""Means to measure: those that a plan offers, but for stale servers, whose learning depends on the link."""

LINKS = (10_000, 1_000, 100)
"""Megabits per second between the hosts."""

STEPS = {"image": 192, "language": 192, "medical": 128}
"""Steps of a training; whole rounds of 64 local steps."""

SMOOTH = 8
"""Steps over which a loss is averaged: one batch says little."""

WARMUP, LEAST, SECONDS = 2, 4, 2.0
"""Steps to warm up, least number of steps after them, and seconds to measure for."""

NAME = "learning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--means", action="append", choices=MEANS)
    parser.add_argument("--link", type=int, action="append", help=f"Mb/s; default: {LINKS}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--slow", type=float, action="append", help="times a step that one host sleeps")
    parser.add_argument("--name", default=NAME, help="of the files in results/")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    before = environment(1)
    strategies = [PLAIN, *(f"{PLAIN},{means}" for means in options.means or MEANS)]
    settings = {"seeds": options.seeds, "steps": STEPS, "workers": 2}
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for recipe in options.recipe or RECIPES:
        curves = learned(recipe, strategies, options.seeds)
        for link, slow in itertools.product(options.link or LINKS, options.slow or (0.0,)):
            steps = stepped(recipe, strategies, link, slow)
            measured.append({"recipe": recipe, "link": link, "slow": slow, "steps": steps, "curves": curves})
            rows += rows_of(recipe, link, slow, curves, steps)
            record(options.name, settings, rows, measured, before)  # each time: a long run may be cut short


# ---- learning --------------------------------------------------------------------------------------------------------


def learned(recipe: str, strategies: Sequence[str], seeds: int) -> dict[str, list[list[float]]]:
    """Return the loss of each step by strategy and seed. Seeds take turns, so that what is cut short is complete."""
    from shardwise import train

    found: dict[str, list[list[float]]] = {strategy: [] for strategy in strategies}
    for seed, strategy in itertools.product(range(seeds), strategies):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "run")
            train(recipe, strategy=strategy, steps=STEPS[recipe], seed=seed, out=out, quiet=True, proof=False)
            lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
        found[strategy].append([line["loss"] for line in lines if "step" in line and "learning_rate" in line])
        sys.stderr.write(f"{recipe} {strategy} seed {seed}: loss {smooth(found[strategy][-1])[-1]:.4g}\n")
    return found


def smooth(losses: Sequence[float]) -> list[float]:
    """Return the mean of the last SMOOTH losses at each step."""
    return [statistics.fmean(losses[max(0, end - SMOOTH) : end]) for end in range(1, len(losses) + 1)]


# ---- links -----------------------------------------------------------------------------------------------------------


def stepped(recipe: str, strategies: Sequence[str], link: int, slow: float) -> dict[str, dict[str, float]]:
    """Return `seconds` and `bytes` of a step by strategy, on two hosts with a link of `link` Mb/s between them."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "measured.json")
        settings = {"recipe": recipe, "strategies": list(strategies), "slow": slow, "out": str(out)}
        try:
            with hosts(1e6 * link):
                status = run_on_hosts(
                    "benchmarks.learning",
                    ["--worker", json.dumps(settings)],
                    2 // HOSTS,
                    {"TORCH_CPP_LOG_LEVEL": "ERROR"},
                )
        except NoHosts as error:
            raise SystemExit(f"benchmarks.learning: {error}") from None
        if status:
            raise SystemExit(f"benchmarks.learning: a worker ended with exit status {status}")
        found: dict[str, dict[str, float]] = json.loads(out.read_text())
    return found


def work(settings: dict[str, Any]) -> None:
    """Measure the steps of all strategies as one of the workers."""
    from shardwise.launch.join import join_launcher
    from shardwise.run.control_group import Workers
    from shardwise.workload.load import load_workload

    join_launcher(2)
    workers = Workers()
    workload = load_workload(settings["recipe"])
    found = {text: _steps(workload, text, settings["slow"], workers) for text in settings["strategies"]}
    if workers.rank == 0:
        Path(settings["out"]).write_text(json.dumps(found))


def _steps(workload: Any, text: str, slow: float, workers: Any) -> dict[str, float]:
    """Return the mean seconds and the sent bytes of a step over whole rounds of local steps."""
    from shardwise.parallel.program import Program
    from shardwise.strategy import Strategy

    strategy = Strategy.parse(text)
    program = Program.build(workload, strategy)
    shares = itertools.cycle(list(itertools.islice(program.loader().shares(0), LEAST)))
    whole = max(1, strategy.local)  # steps from one average to the next
    unit = whole * max(1, LEAST // whole)
    for _ in range(WARMUP + -WARMUP % whole):
        alone = _timed(program, shares, 0.0)
    pause = slow * float(workers.exchange(str(alone))[0]) if workers.rank == 1 else 0.0
    begin = time.perf_counter()
    for _ in range(unit):
        _timed(program, shares, pause)
    rounds = max(row[0] for row in workers.numbers(int(SECONDS / (time.perf_counter() - begin)))) + 1
    sent, begin = _sent(), time.perf_counter()
    for _ in range(rounds * unit):  # no worker waits for another but by the strategy
        _timed(program, shares, pause)
    seconds = (time.perf_counter() - begin) / (rounds * unit)
    slowest = max(map(float, workers.exchange(str(seconds))))
    return {"seconds": slowest, "bytes": (_sent() - sent) / (rounds * unit)}


def _timed(program: Any, shares: Iterator[Any], pause: float) -> float:
    start = time.perf_counter()
    program.step_share(next(shares))
    took = time.perf_counter() - start
    time.sleep(pause)
    return took


def _sent() -> int:
    """Return the bytes that this host has sent so far."""
    name = next(name for name in map(device, range(HOSTS)) if Path("/sys/class/net", name).exists())
    return int(Path("/sys/class/net", name, "statistics/tx_bytes").read_text())


# ---- results ---------------------------------------------------------------------------------------------------------


def rows_of(
    recipe: str, link: int, slow: float, curves: dict[str, list[list[float]]], steps: dict[str, dict[str, float]]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each strategy on a link."""
    ends = {strategy: [smooth(losses)[-1] for losses in by_seed] for strategy, by_seed in curves.items()}
    goal = statistics.fmean(ends[PLAIN]) + _spread(ends[PLAIN])
    plain = steps[PLAIN]
    least = _seconds_to(goal, curves[PLAIN], plain["seconds"])
    for strategy, own in steps.items():
        reached = _seconds_to(goal, curves[strategy], own["seconds"])
        yield {
            "recipe": recipe,
            "Mb/s": link,
            "slow": slow,
            "strategy": strategy,
            "loss": statistics.fmean(ends[strategy]),
            "spread": _spread(ends[strategy]),
            "step ms": 1e3 * own["seconds"],
            "MB sent": own["bytes"] / 1e6,
            "fewer bytes": plain["bytes"] / max(1.0, own["bytes"]),
            "s to loss": "-" if reached is None else reached,
            "faster": "-" if reached is None or least is None else least / reached,
        }


def _spread(values: Sequence[float]) -> float:
    """Return the standard deviation over the seeds; 0 for one."""
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _seconds_to(goal: float, curves: Sequence[Sequence[float]], seconds: float) -> float | None:
    """Return the seconds to a loss: of the median seed. Returns None if fewer than half of the seeds reach it."""
    counts = [next((step for step, loss in enumerate(smooth(each), 1) if loss <= goal), None) for each in curves]
    reached = sorted(count for count in counts if count is not None)
    return median(reached) * seconds if 2 * len(reached) > len(counts) else None


if __name__ == "__main__":
    main()
