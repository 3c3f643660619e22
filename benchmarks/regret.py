"""Regret of the planner: the cost of its choice over the best strategy there is, and that of the usual defaults.

Two hosts of one core each, made of network namespaces, with links of 10 Gb/s, 1 Gb/s and 100 Mb/s between them; recipes
and models of Hugging Face on 2 and on 4 workers. For each number of workers and each link:

    calibrate    the workers measure their hosts and the link, as `shardwise calibrate` does, and know nothing else
    plan         for each model: the five best strategies, the best one of every combination of axes, the usual defaults
    measure      all of these once; then the choice and all that came close to the fastest, in rounds, forwards and
                 backwards in turn: the median step over the rounds
    regret       the planner's choice over the fastest of all that were measured, minus one

    python -m benchmarks.regret [--link MBIT ...] [--workers N ...] [--model NAME ...] [--rounds N] [--seconds S]
    python -m benchmarks.regret --page          writes docs/regret.md from the results

Needs root, `ip`, `tc` and two cores. The page is written after a run with all that there is, too.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.harness import environment, record
from benchmarks.hosts import HOSTS, NoHosts, hosts, run_on_hosts
from benchmarks.regret_page import write_page

if TYPE_CHECKING:
    from shardwise.cluster.cluster import Cluster
    from shardwise.parallel.program import Program
    from shardwise.run.control_group import Workers
    from shardwise.workload.data import Share
    from shardwise.workload.workload import Workload

LINKS = (10_000, 1_000, 100)
"""Megabits per second between hosts."""

WORKERS = (2, 4)

CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "architectures": ["GPT2LMHeadModel"],
        "model_type": "gpt2",
        "vocab_size": 256,
        "n_positions": 128,
        "n_embd": 192,
        "n_layer": 4,
        "n_head": 4,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "bert": {
        "architectures": ["BertForMaskedLM"],
        "model_type": "bert",
        "vocab_size": 256,
        "max_position_embeddings": 128,
        "hidden_size": 128,
        "intermediate_size": 512,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
    },
}
"""Models of Hugging Face, by their configurations."""

MODELS = ("image", "language", "medical", *CONFIGURATIONS)

USUAL = {"DDP": "dp={}", "FSDP": "fsdp={}", "tensor parallel": "tp={}"}
"""Strategies that people take without asking, for so many workers. Accelerate's default is DDP."""

AXES = ("dp", "fsdp", "pp", "tp")
"""Axes; the best strategy of every combination of their degrees is measured."""

MEAN_TARGET, WORST_TARGET = 0.02, 0.10

NAME = "regret"
WARMUP, LEAST_STEPS = 2, 3

SLOW = 2.0
"""Seconds of a step above which the last one of warming up counts, and no more are made."""

CLOSE = 1.25
"""Times the fastest, up to which a strategy is measured in all rounds."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--link", type=int, action="append", help=f"Mb/s; default: {LINKS}")
    parser.add_argument("--workers", type=int, action="append", choices=WORKERS)
    parser.add_argument("--model", action="append", choices=MODELS)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--seconds", type=float, default=0.7, help="to measure each strategy for, in each round")
    parser.add_argument("--name", default=NAME, help="of the files in results/")
    parser.add_argument("--page", action="store_true", help="write docs/regret.md from the results, measure nothing")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.page:
        write_page(NAME, USUAL)
        return
    if options.worker:
        work(json.loads(options.worker))
        return
    before = environment(None)
    asked = {"models": options.model or MODELS, "rounds": options.rounds, "seconds": options.seconds}
    rows: list[dict[str, Any]] = []
    measured: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for workers in options.workers or WORKERS:
            for link in options.link or LINKS:
                found = _run(workers, link, Path(folder), asked)
                measured += found
                rows += [row(each) for each in found]
                settings = {"rounds": options.rounds, "seconds": options.seconds, **summary(rows)}
                record(options.name, settings, rows, measured, before)  # each time: a long run may be cut short
    if options.name == NAME:
        write_page(NAME, USUAL)


def _run(workers: int, link: int, folder: Path, asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    out = folder / "measured.json"
    settings = {**asked, "out": str(out), "folder": str(folder), "workers": workers, "link": link}
    try:
        with hosts(1e6 * link):
            status = run_on_hosts(
                "benchmarks.regret",
                ["--worker", json.dumps(settings)],
                workers // HOSTS,
                {"TORCH_CPP_LOG_LEVEL": "ERROR"},
            )
    except NoHosts as error:
        raise SystemExit(f"benchmarks.regret: {error}") from None
    if status:
        raise SystemExit(f"benchmarks.regret: a worker ended with exit status {status}")
    found: list[dict[str, Any]] = json.loads(out.read_text())
    return found


# ---- in every worker ------------------------------------------------------------------------------------------------


def work(settings: Mapping[str, Any]) -> None:
    """Calibrates, plans and measures, as one of the workers."""
    from shardwise.run.calibration.calibrate import QUICK, calibrate
    from shardwise.run.control_group import Workers

    cluster = calibrate(effort=QUICK, quiet=True)
    workers = Workers()
    found = []
    for model in settings["models"]:
        workload = _load(model, Path(settings["folder"]))
        plan: dict[str, Any] = {}
        if cluster is not None:
            plan = _plan(workload, cluster, settings["workers"])
        plan = json.loads(workers.exchange(json.dumps(plan))[0])
        entry = {key: settings[key] for key in ("workers", "link")} | {"model": model, **plan}
        entry["measured"] = _measured(workload, plan, settings, workers)
        found.append(entry)
        if cluster is not None:
            _say(entry)
    if cluster is not None:
        Path(settings["out"]).write_text(json.dumps(found))


def _load(model: str, folder: Path) -> Workload:
    from shardwise.workload.load import load_workload

    if model not in CONFIGURATIONS:
        return load_workload(model)
    path = folder / model / "config.json"
    if os.environ["RANK"] == "0":
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(CONFIGURATIONS[model]))
    while not path.exists():
        time.sleep(0.05)
    return load_workload(str(path.parent), {"batch_size": 16})


def _plan(workload: Workload, cluster: Cluster, workers: int) -> dict[str, Any]:
    """The choice, and the predictions of all that are to be measured."""
    from shardwise.commands.request import check
    from shardwise.errors import ShardwiseError
    from shardwise.planner.constraints import Constraints
    from shardwise.planner.plan import Candidate
    from shardwise.planner.search.search import search
    from shardwise.predict.closed_form.step_time import predict
    from shardwise.predict.profile.interpolate import ScaledProfiles
    from shardwise.predict.simulate import profiles_on
    from shardwise.strategy import Strategy

    start = time.perf_counter()
    profiles = ScaledProfiles(profiles_on(workload, cluster))
    candidates: list[Candidate] = list(search(workload, cluster, workers, Constraints(), profiles).plan.candidates)
    took = time.perf_counter() - start
    predicted: dict[str, float] = {}

    def note(candidate: Candidate) -> None:
        settled = candidate.strategy.for_batch(workload.batch_size)
        predicted.setdefault(str(settled), candidate.prediction.step_seconds)

    for candidate in candidates[:5]:
        note(candidate)
    chosen = next(iter(predicted))
    for degrees in _degrees(workers, len(AXES)):
        wish = Constraints(fixed=dict(zip(AXES, map(str, degrees), strict=True)))
        best = search(workload, cluster, workers, wish, profiles).plan.best
        if best is not None:
            note(best)
    usual: dict[str, str] = {}
    for name, text in USUAL.items():
        strategy = Strategy.parse(text.format(workers))
        try:
            check(workload, strategy)
        except ShardwiseError:
            continue
        note(Candidate(strategy, predict(profiles.of(strategy), strategy, cluster)))
        usual[name] = str(strategy.for_batch(workload.batch_size))
    return {"chosen": chosen, "predicted": predicted, "usual": usual, "planning_seconds": took}


def _degrees(workers: int, axes: int) -> Iterator[tuple[int, ...]]:
    """Yield the degrees of `axes` axes whose product is `workers`."""
    if axes == 1:
        yield (workers,)
        return
    for degree in range(1, workers + 1):
        if workers % degree == 0:
            for rest in _degrees(workers // degree, axes - 1):
                yield (degree, *rest)


def _measured(
    workload: Workload, plan: Mapping[str, Any], settings: Mapping[str, Any], workers: Workers
) -> dict[str, list[float]]:
    """Strategy -> seconds of its median step in each round that it was measured in."""
    strategies, chosen = list(plan["predicted"]), plan["chosen"]
    _step_seconds(workload, chosen, 0.0, workers)  # the first program of a process is slower
    found: dict[str, list[float]] = {strategy: [] for strategy in strategies}
    for number in range(settings["rounds"]):
        for strategy in strategies if number % 2 == 0 else reversed(strategies):
            found[strategy].append(_step_seconds(workload, strategy, settings["seconds"], workers))
        seconds = {strategy: statistics.median(rounds) for strategy, rounds in found.items()}
        close = CLOSE * min(seconds.values())
        strategies = [strategy for strategy in strategies if strategy == chosen or seconds[strategy] <= close]
    return found


def _step_seconds(workload: Workload, strategy: str, seconds: float, workers: Workers) -> float:
    """Return the seconds of the median step, as the slowest worker has it. Collective."""
    import itertools

    import torch.distributed as dist

    from shardwise.parallel.program import Program
    from shardwise.strategy import Strategy

    program = Program.build(workload, Strategy.parse(strategy))
    shares = itertools.cycle(list(itertools.islice(program.loader().shares(0), LEAST_STEPS)))

    warm = [_timed(program, shares) for _ in range(WARMUP)][-1:]
    slow = warm[0] > SLOW
    took: list[float] = []
    begin = time.perf_counter()
    while not workers.anywhere([slow or (len(took) >= LEAST_STEPS and time.perf_counter() - begin > seconds)])[0]:
        took.append(_timed(program, shares))
    took = took or warm
    by_worker = workers.exchange(str(statistics.median(took)))
    dist.barrier()
    del program, shares
    _forget(workers)
    return max(map(float, by_worker))


def _timed(program: Program, shares: Iterator[Share]) -> float:
    """Seconds of a step."""
    start = time.perf_counter()
    program.step_share(next(shares))
    return time.perf_counter() - start


def _forget(workers: Workers) -> None:
    """Frees the groups of a program that is gone: each has threads that poll."""
    import gc

    import torch.distributed as dist
    from torch.distributed import distributed_c10d

    from shardwise.parallel.mesh import forget_meshes

    forget_meshes()
    gc.collect()
    stay = {id(workers.group), id(dist.group.WORLD)}
    for group in [g for g in distributed_c10d._world.pg_map if id(g) not in stay]:
        dist.destroy_process_group(group)
    gc.collect()


def _say(entry: Mapping[str, Any]) -> None:
    found = row(entry)
    words = ", ".join(f"{key} {_words(value)}" for key, value in found.items())
    sys.stderr.write(f"{words}\n")


def _words(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)


# ---- what came out --------------------------------------------------------------------------------------------------


def row(entry: Mapping[str, Any]) -> dict[str, Any]:
    """Return the row of a model on some number of workers over one kind of link."""
    seconds = {strategy: statistics.median(rounds) for strategy, rounds in entry["measured"].items()}
    chosen, best = entry["chosen"], min(seconds, key=lambda strategy: seconds[strategy])
    least = seconds[best]
    usual = {name: seconds.get(entry["usual"].get(name, "")) for name in USUAL}
    return {
        "model": entry["model"],
        "workers": entry["workers"],
        "Mb/s": entry["link"],
        "chosen": chosen,
        "predicted ms": 1e3 * entry["predicted"][chosen],
        "measured ms": 1e3 * seconds[chosen],
        "fastest": best,
        "fastest ms": 1e3 * least,
        "regret": seconds[chosen] / least - 1,
        **{name: value / least - 1 if value else "cannot" for name, value in usual.items()},
        "tried": len(seconds),
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Mean and worst regret, of the planner and of the usual defaults where they can run."""
    found: dict[str, Any] = {}
    for name, key in (("planner", "regret"), *((name, name) for name in USUAL)):
        values = [row[key] for row in rows if not isinstance(row[key], str)]
        if values:
            found[f"{name}: mean regret"] = statistics.mean(values)
            found[f"{name}: worst regret"] = max(values)
    return found | {"aimed at, mean": MEAN_TARGET, "aimed at, worst": WORST_TARGET}


if __name__ == "__main__":
    main()
