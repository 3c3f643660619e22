"""Predictions for this machine against its runs: recipes and small Hugging Face models x strategies on 1 to 4 workers.

    python -m benchmarks.this_machine [--steps N] [--workload NAME ...] [--strategy SPEC ...] [--cluster FILE]

The machine is measured as a first run measures it by itself, unless a cluster file is given; all runs are predicted
before any is made. The trainings of a workload take turns, a slice of steps each, as those of `compare` do; measured
are medians over slices. Nothing of the runs goes into the predictions. Beside them a reference training takes its
turns: how much longer it takes than while the machine was measured is the pace, and "error at pace" is that of the
prediction times the pace. It needs an idle machine: what others use meanwhile is told beside the rows.

Models of Hugging Face have random weights and are described here: nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.harness import environment, median, record
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.measure.interference import busy_seconds, cores_of_others
from shardwise.cluster.toml_reader import read_cluster
from shardwise.commands.compare import pace_of, reference_turns, samples
from shardwise.commands.request import check
from shardwise.errors import StrategyError
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.run.calibration.calibrate import QUICK, THOROUGH, Effort, calibrate
from shardwise.run.calibration.reference import Reference
from shardwise.run.training.in_turns import TrainingInTurns, Turns, slice_steps
from shardwise.run.training.job import Job, Options
from shardwise.strategy import Strategy
from shardwise.workload.source import Source

RECIPES = ("image", "language", "medical")

MODELS: dict[str, dict[str, Any]] = {
    "gpt2": {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 128,
        "n_layer": 4,
        "n_head": 4,
        "n_positions": 128,
        "vocab_size": 256,
        "bos_token_id": 0,
        "eos_token_id": 0,
    },
    "llama": {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": 128,
        "intermediate_size": 352,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "max_position_embeddings": 128,
        "vocab_size": 256,
    },
}
"""Configurations of Hugging Face models by name; their folders are workloads."""

STRATEGIES = ("single", "dp=2", "fsdp=2", "fsdp=2,zero=1", "tp=2", "pp=2", "dp=2,tp=2", "fsdp=2,pp=2")

TARGET_TIME, WORST_TIME, TARGET_MEMORY, WITHIN = 0.07, 0.20, 0.05, 0.9
"""Aims: median and largest absolute relative error of time, that of memory, and share of rows within their range."""


@dataclass
class Run:
    """A workload under a strategy: what is predicted, and what each round measured.

    Attributes:
        workload: name of the workload.
        source: the workload.
        strategy: the strategy.
        predicted: seconds of a step, and bytes of a worker.
        range: relative range around the predicted seconds.
        measured: the same two of each slice of its steps.
        pace: time of the reference training beside it, over that while the machine was measured; None: not known.
    """

    workload: str
    source: Source
    strategy: Strategy
    predicted: tuple[float, float] = (0.0, 0.0)
    range: float = 0.0
    measured: list[tuple[float, float]] = field(default_factory=list)
    pace: float | None = None

    @property
    def name(self) -> str:
        return f"{self.workload} {self.strategy}"


def main() -> None:
    options = _options()
    before = environment(None)
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sources = {name: source(name, Path(folder)) for name in options.workload or (*RECIPES, *MODELS)}
        strategies = [Strategy.parse(text) for text in options.strategy or STRATEGIES]
        runs = [run for name, each in sources.items() for run in runs_of(name, each, strategies)]
        cluster = measured_cluster(options.cluster, QUICK)
        predict(runs, cluster)
        reference = Reference.of(cluster.device(0))
        busy = [measure([run for run in runs if run.workload == name], options.steps, reference) for name in sources]
    rows = [row(run) for run in runs]
    settings = {
        "steps": options.steps,
        "slices": max(len(run.measured) for run in runs),
        "seconds": round(time.perf_counter() - begin),
        "cores used by others, calibration": cluster.busy,
        "cores used by others, runs": round(max(busy), 3),
        **summary(rows),
    }
    both = {run.name: {"predicted": run.predicted, "range": run.range, "measured": run.measured} for run in runs}
    record(options.name, settings, rows, both, before)
    for name, value in settings.items():
        print(f"{name}: {value}")


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60, help="of each run")
    parser.add_argument("--workload", action="append", choices=(*RECIPES, *MODELS), help="default: all")
    parser.add_argument("--strategy", action="append", help=f"default: {' '.join(STRATEGIES)}")
    parser.add_argument("--name", default="this-machine", help="of the files in results/")
    parser.add_argument("--cluster", help="a cluster file of this machine, in place of measuring it")
    return parser.parse_args()


def measured_cluster(file: str | None, effort: Effort = THOROUGH) -> Cluster:
    """Return the cluster of a file, or of this machine, which is measured now."""
    if file is not None:
        return read_cluster(file)
    say("measuring this machine")
    cluster = calibrate(effort=effort, quiet=True)
    assert cluster is not None  # there is no outer launcher
    return cluster


def source(name: str, folder: Path) -> Source:
    """Return the workload of a recipe, or of a model's folder, which is written below `folder`."""
    if name in RECIPES:
        return Source(workload=name)
    (folder / name).mkdir()
    (folder / name / "config.json").write_text(json.dumps(MODELS[name]))
    return Source(workload=str(folder / name), settings={"batch_size": "8", "sequence": "64"})


def runs_of(name: str, source: Source, strategies: Sequence[Strategy]) -> Iterator[Run]:
    """Yield the runs of a workload that can be."""
    workload = source.load()
    for strategy in strategies:
        try:
            check(workload, strategy)
        except StrategyError as error:
            say(f"{name} {strategy} is left out: {error}")
            continue
        yield Run(name, source, strategy)


def predict(runs: Sequence[Run], cluster: Cluster) -> None:
    """Predict all runs, with one set of profiles for each workload."""
    known: dict[str, tuple[ProfileSource, Cluster]] = {}
    for run in runs:
        if run.workload not in known:
            say(f"predicting {run.workload}")
            workload = run.source.load()
            own = cluster.importing(workload.libraries)
            known[run.workload] = profiles_on(workload, own), own
        found = simulate(known[run.workload][0], run.strategy, known[run.workload][1])
        run.predicted = found.step_seconds, float(found.memory.allocated)
        run.range = found.error or 0.0


def measure(runs: Sequence[Run], steps: int, reference: Reference | None) -> float:
    """Make the runs of a workload in turns, and the reference training with them.

    Returns:
        Cores that other programs used before the first turn and after the last, on average.
    """
    size = slice_steps(steps)
    options = Options(steps=steps, quiet=True, proof=False)
    turns = [
        Turns(Job(source=run.source, strategy=run.strategy, options=options, slice_steps=size), run.name)
        for run in runs
    ]
    paced = reference_turns(reference, steps, gpus=False)
    looks = [_others()]
    everything = [*turns, *([paced] if paced else [])]
    TrainingInTurns(everything, steps=steps, threads=None, gpus=False, quiet=True).run()
    looks.append(_others())
    for run, each in zip(runs, turns, strict=True):
        run.pace = pace_of(reference, paced)
        if each.trained is None:
            raise SystemExit(f"{run.name}: {each.failed}")
        memory = float(each.trained.summary["memory_bytes"])
        run.measured = [(seconds, memory) for seconds in samples(each.steps, size)]
        say(_told(run))
    return sum(looks) / len(looks)


def _others() -> float:
    return cores_of_others(0.5) if busy_seconds() else 0.0


def _told(run: Run) -> str:
    found = row(run)
    foreseen = f"{found['predicted ms']:.1f} ms ± {run.range:.0%}"
    pace = "" if run.pace is None else f", at pace {found['error at pace']:+.0%}"
    return f"{run.name}: {found['measured ms']:.1f} ms, predicted {foreseen} ({found['error']:+.0%}{pace})"


def say(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()


def row(run: Run) -> dict[str, Any]:
    seconds, memory = (median(values) for values in zip(*run.measured, strict=True))
    error = run.predicted[0] / seconds - 1
    return {
        "workload": run.workload,
        "strategy": str(run.strategy),
        "workers": run.strategy.workers,
        "predicted ms": 1e3 * run.predicted[0],
        "±": run.range,
        "measured ms": 1e3 * seconds,
        "error": error,
        "pace": run.pace,
        "error at pace": None if run.pace is None else run.pace * run.predicted[0] / seconds - 1,
        "within": abs(seconds / run.predicted[0] - 1) <= run.range,
        "predicted MiB": run.predicted[1] / 2**20,
        "measured MiB": memory / 2**20,
        "memory error": run.predicted[1] / memory - 1,
    }


def summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Summarize what the aims are about: median and worst errors, and the share of rows within their range."""
    worst_memory = max(rows, key=lambda each: abs(each["memory error"]))
    paced = [each for each in rows if each["pace"] is not None]
    return {
        **_errors("time", rows, "error"),
        **(_errors("time at pace", paced, "error at pace") if paced else {}),
        "share of rows within their range": round(sum(each["within"] for each in rows) / len(rows), 3),
        "median error of memory": round(median([abs(each["memory error"]) for each in rows]), 4),
        "worst row of memory": f"{worst_memory['workload']} {worst_memory['strategy']} "
        f"{worst_memory['memory error']:+.1%}",
        "aimed at": f"time {TARGET_TIME:.0%}, worst {WORST_TIME:.0%}, memory {TARGET_MEMORY:.0%}, within {WITHIN:.0%}",
    }


def _errors(what: str, rows: Sequence[Mapping[str, Any]], key: str) -> dict[str, Any]:
    errors = sorted(abs(each[key]) for each in rows)
    worst = max(rows, key=lambda each: abs(each[key]))
    return {
        f"median error of {what}": round(median(errors), 4),
        f"error of {what} in nine of ten rows": round(errors[max(0, -(-9 * len(errors) // 10) - 1)], 4),
        f"worst row of {what}": f"{worst['workload']} {worst['strategy']} {worst[key]:+.1%}",
    }


if __name__ == "__main__":
    main()
