"""Measure what means that change training cost in learning, and save on slow links.

    python -m benchmarks.learning [--recipe NAME] [--means MEANS] [--link MBIT] [--seeds N] [--slow TIMES]
                                 [--curves FILE]

All but --seeds and --curves can be repeated. Two measurements of each recipe, on 2 workers:

    learning    the recipe is trained for STEPS steps on local workers, under data parallelism and under each means,
                with several seeds: the loss on held-out samples after as many steps. The link does not change it.
                Replicas that take local steps are evaluated at the mean of their parameters
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
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, median, record
from benchmarks.hosts import HOSTS, NoHosts, device, hosts, run_on_hosts
from benchmarks.learning_page import write_page
from shardwise.planner import means as planner

RECIPES: dict[str, dict[str, int]] = {
    "image": {},
    "language": {"sequence": 64, "evaluation_samples": 64},
    "medical": {"patch": 16},
}
"""Recipes to train, with smaller samples than usual, so that all means with three seeds take minutes."""

PLAIN = "dp=2"
MEANS = (
    *(means for means in planner.MEANS if not means.startswith(("ps=", "schedule="))),
    *("local=128", "compress=topk:0.004"),
)
"""Means to measure: those that a plan offers, but for stale servers, whose learning depends on the link; and two that
send more than 100 times fewer bytes."""

LINKS = (10_000, 1_000, 100)
"""Megabits per second between the hosts."""

STEPS = {"image": 256, "language": 128, "medical": 128}
"""Steps of a training, over which the learning rate rises and falls: whole rounds of 128 local steps."""

EVERY = 16
"""Steps between two evaluations on held-out samples."""

WARMUP, LEAST, SECONDS = 2, 4, 2.0
"""Steps to warm up, least number of steps after them, and seconds to measure for."""

NAME = "learning"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--means", action="append", help=f"default: {MEANS}")
    parser.add_argument("--link", type=int, action="append", help=f"Mb/s; default: {LINKS}; 0: none")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--curves", type=Path, help="file of losses that are known; others are added to it")
    parser.add_argument("--slow", type=float, action="append", help="times a step that one host sleeps")
    parser.add_argument(
        "--name", default=NAME, help="of the files in results/; the page has all that begin with learning"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        work(json.loads(options.worker))
        return
    before = environment(1)
    strategies = [PLAIN, *(f"{PLAIN},{means}" for means in options.means or MEANS)]
    settings = {"seeds": options.seeds, "steps": STEPS, "changed": RECIPES, "workers": 2}
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    for recipe in options.recipe or RECIPES:
        curves = learned(recipe, strategies, options.seeds, options.curves)
        if options.link == [0]:
            continue
        for link, slow in itertools.product(options.link or LINKS, options.slow or (0.0,)):
            steps = stepped(recipe, strategies, link, slow)
            measured.append({"recipe": recipe, "link": link, "slow": slow, "steps": steps, "curves": curves})
            rows += rows_of(recipe, link, slow, curves, steps)
            record(options.name, settings, rows, measured, before)  # each time: a long run may be cut short
    if measured:
        write_page(NAME)


# ---- learning --------------------------------------------------------------------------------------------------------


def learned(recipe: str, strategies: Sequence[str], seeds: int, file: Path | None) -> dict[str, list[list[float]]]:
    """Return the losses of each training by strategy and seed: those that `file` has, the others by training.

    Seeds take turns, so that what is cut short is complete.
    """
    from shardwise.launch.local import run_local

    known: dict[str, list[float]] = json.loads(file.read_text()) if file is not None and file.exists() else {}
    for seed in range(seeds):
        lacking = [each for each in strategies if _key(recipe, each, seed) not in known]
        known |= run_local(_losses, (recipe, lacking, seed), workers=2) if lacking else {}
        if file is not None:
            file.write_text(json.dumps(known))
    return {each: [known[_key(recipe, each, seed)] for seed in range(seeds)] for each in strategies}


def _key(recipe: str, strategy: str, seed: int) -> str:
    return f"{recipe} {strategy} seed={seed}"


def _losses(recipe: str, strategies: Sequence[str], seed: int) -> dict[str, list[float]]:
    """Train under each strategy as one of the workers; return the held-out losses after every `EVERY` steps by key."""
    from shardwise.parallel.program import Program
    from shardwise.run.control_group import Workers
    from shardwise.strategy import Strategy
    from shardwise.workload.load import load_workload
    from shardwise.workload.recipes.training import warmup_cosine

    workers = Workers()
    workload = replace(load_workload(recipe, RECIPES[recipe]), seed=seed, schedule=warmup_cosine(STEPS[recipe]))
    found: dict[str, list[float]] = {}
    for text in strategies:
        program = Program.build(workload, Strategy.parse(text))
        loader = program.loader()
        shares = itertools.islice(itertools.chain.from_iterable(map(loader.shares, itertools.count())), STEPS[recipe])
        losses = []
        for step, share in enumerate(shares, 1):
            program.step_share(share)
            if step % EVERY == 0:
                losses.append(program.evaluate([0])["loss"])
        found[_key(recipe, text, seed)] = losses
        if workers.rank == 0:
            sys.stderr.write(f"{_key(recipe, text, seed)}: {losses[-1]:.4g}\n")
    return found


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
    workload = load_workload(settings["recipe"], RECIPES[settings["recipe"]])
    alone = _alone(workload, workers)
    pause = settings["slow"] * alone if workers.rank == 1 else 0.0
    found = {text: _steps(workload, text, pause, workers) for text in settings["strategies"]}
    if workers.rank == 0:
        Path(settings["out"]).write_text(json.dumps(found))


def _alone(workload: Any, workers: Any) -> float:
    """Return the seconds that a step of a worker takes without a link."""
    from shardwise.parallel.program import Program
    from shardwise.strategy import Strategy

    program = Program.build(workload, Strategy.parse(f"{PLAIN},local=1000000"))
    shares = itertools.islice(program.loader().shares(0), WARMUP + LEAST)
    took = [_timed(program, shares, 0.0) for _ in range(WARMUP + LEAST)]
    return float(workers.exchange(str(median(took[WARMUP:])))[0])


def _steps(workload: Any, text: str, pause: float, workers: Any) -> dict[str, float]:
    """Return the mean seconds and the sent bytes of a step over whole rounds of local steps."""
    from shardwise.parallel.program import Program
    from shardwise.strategy import Strategy

    strategy = Strategy.parse(text)
    program = Program.build(workload, strategy)
    shares = itertools.cycle(list(itertools.islice(program.loader().shares(0), LEAST)))
    unit = max(1, strategy.local) * max(1, LEAST // max(1, strategy.local))  # so many steps have whole rounds
    for _ in range(WARMUP):
        _timed(program, shares, 0.0)
    sent, begin = _sent(), time.perf_counter()
    for _ in range(unit):  # no worker waits for another but by the strategy
        _timed(program, shares, pause)
    further = max(row[0] for row in workers.numbers(int(SECONDS / (time.perf_counter() - begin))))
    for _ in range(further * unit):
        _timed(program, shares, pause)
    steps = (1 + further) * unit
    seconds = (time.perf_counter() - begin) / steps
    slowest = max(map(float, workers.exchange(str(seconds))))
    return {"seconds": slowest, "bytes": (_sent() - sent) / steps}


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
    ends = {strategy: [losses[-1] for losses in by_seed] for strategy, by_seed in curves.items()}
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
    counts = [next((EVERY * number for number, loss in enumerate(each, 1) if loss <= goal), None) for each in curves]
    reached = sorted(count for count in counts if count is not None)
    return median(reached) * seconds if 2 * len(reached) > len(counts) else None


if __name__ == "__main__":
    main()
