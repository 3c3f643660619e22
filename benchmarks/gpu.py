"""One GPU: predictions against runs, and Shardwise's step against the same step written by hand.

    python -m benchmarks.gpu [--case NAME ...] [--steps N] [--rounds N] [--cluster FILE] [--measured FILE]

The GPU is measured first, as `shardwise calibrate` does it, unless its cluster file is given. Every case is predicted
with that file and with the catalogue's device of the same chip, run dry without memory, trained, and trained by hand
in turns with Shardwise's program in one process. Nothing of the runs goes into the predictions. With `--measured`,
runs that were measured before are predicted again, which needs no GPU.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.gpu_step import in_turns
from benchmarks.harness import RESULTS, environment, median, record
from benchmarks.this_machine import measured_cluster
from benchmarks.transformer import Size, transformer_workload
from shardwise.cluster.find import find_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.launch.local import run_local
from shardwise.predict.dry_run.dry_run import dry_run
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.run.training.execute import run_job
from shardwise.run.training.job import Job, Options
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.source import Source

if TYPE_CHECKING:
    from shardwise import Workload
    from shardwise.cluster.cluster import Cluster

CATALOGUED = "h200"
"""Device of the catalogue that the runs are predicted with, too."""

TARGET_TIME, TARGET_MEMORY, TARGET_RATIO = 0.07, 0.05, 1.02
"""Median absolute relative errors and the ratio of step times that are aimed at."""


@dataclass(frozen=True)
class Case:
    """A training: a name, a function that builds its workload, and its strategies, all of one worker."""

    name: str
    workload: Callable[[], Workload]
    strategies: tuple[str, ...]


def resnet() -> Workload:
    """ResNet-50 on random images of the usual size; torchvision is imported where the model is built."""
    import torch.nn.functional as F
    from torch.utils.data import TensorDataset

    from shardwise import Workload

    def build() -> torch.nn.Module:
        from torchvision.models import resnet50  # type: ignore[import-not-found, import-untyped, unused-ignore]

        model: torch.nn.Module = resnet50()
        return model

    images = torch.randn(64, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    return Workload(
        name="resnet-50",
        model=build,
        dataset=TensorDataset(images, torch.arange(64)),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        batch_size=64,
    )


GPTS = {
    "gpt-125m": Size(layers=12, hidden=768, heads=12, sequence=1024, vocabulary=50304, batch=8),
    "gpt-350m": Size(layers=24, hidden=1024, heads=16, sequence=1024, vocabulary=50304, batch=8),
}
LLAMA = "gpt:layers=16,hidden=2048,heads=32,kv_heads=8,ffn=8192,vocabulary=128256,sequence=2048,tied=true,batch_size=4"
"""The sizes of Llama 3.2 1B."""

DTYPES = ("single,precision=float32", "single,precision=bf16")
CASES = (
    *(Case(name, lambda name=name: load_workload(name), DTYPES) for name in ("image", "language", "medical")),  # type: ignore[misc]
    *(
        Case(name, lambda size=size: transformer_workload(size), (*DTYPES, "single,precision=bf16,recompute=full"))  # type: ignore[misc]
        for name, size in GPTS.items()
    ),
    Case("resnet-50", resnet, DTYPES),
    Case("llama-1b", lambda: load_workload(LLAMA), DTYPES[1:]),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", choices=[case.name for case in CASES], help="default: all")
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--cluster", help="a cluster file of this GPU, in place of measuring it")
    parser.add_argument("--measured", type=Path, help="an earlier result to predict again")
    parser.add_argument("--name", default="gpu", help="of the files in results/")
    options = parser.parse_args()
    chosen = [case for case in CASES if options.case is None or case.name in options.case]
    before = environment(None)
    if options.measured is None and not torch.cuda.is_available():
        parser.error("there is no GPU here: give runs of one with --measured")
    cluster = measured_cluster(options.cluster)
    if options.cluster is None:
        write_cluster(cluster, RESULTS / f"{options.name}-cluster.toml")
    if options.measured is not None:
        earlier = json.loads(options.measured.read_text())
        before, runs = {**earlier, "predicted": before["date"]}, earlier["measured"]
    else:
        runs = measure(chosen, options.steps, options.rounds)
    rows = [
        row(name, strategy, runs[f"{name} {strategy}"], predicted(workload, Strategy.parse(strategy), cluster))
        for name, strategy, workload in each(chosen)
        if f"{name} {strategy}" in runs
    ]
    keys = ("command", "date", "predicted", "remark", "processor", "cpus", "python", "torch", "shardwise")
    facts = {key: before[key] for key in keys if key in before}
    settings = {"gpu": cluster.nodes[0].device.name, "steps": options.steps, "rounds": options.rounds, **summary(rows)}
    record(options.name, settings, rows, runs, facts)


def each(cases: list[Case]) -> list[tuple[str, str, Workload]]:
    """The runs: name of the case, strategy, workload."""
    built = [(case, case.workload()) for case in cases]
    return [(case.name, strategy, workload) for case, workload in built for strategy in case.strategies]


def measure(cases: list[Case], steps: int, rounds: int) -> dict[str, dict[str, Any]]:
    """Train each case by itself, then in turns with the same step by hand."""
    found: dict[str, dict[str, Any]] = {}
    there = [case for case in cases if case.name != "resnet-50" or find_spec("torchvision")]
    for name, text, workload in each(there):
        source, strategy = Source(workload=workload), Strategy.parse(text)
        told = run_job(Job(source=source, strategy=strategy, options=Options(steps=steps, quiet=True))).summary
        turns = run_local(in_turns, (workload, strategy, rounds), workers=1)
        found[f"{name} {text}"] = {"seconds": told["step_seconds"], "bytes": told["memory_bytes"], **turns}
        print(name, text, json.dumps(found[f"{name} {text}"]), flush=True)
    return found


def predicted(workload: Workload, strategy: Strategy, cluster: Cluster) -> dict[str, float]:
    """Step time and memory with the measured device and with the catalogue's, and memory of the dry run."""
    catalogue = find_cluster(CATALOGUED)
    measured, listed = (simulate(profiles_on(workload, on), strategy, on) for on in (cluster, catalogue))
    dry = dry_run(workload, strategy, device="gpu").memory
    return {
        "seconds": measured.step_seconds,
        "bytes": measured.memory.allocated,
        "catalogue seconds": listed.step_seconds,
        "catalogue bytes": listed.memory.allocated,
        "dry bytes": dry.total,
    }


def row(name: str, strategy: str, run: Mapping[str, Any], told: Mapping[str, float]) -> dict[str, Any]:
    seconds, size = run["seconds"], run["bytes"]
    ratios = [ours / hand for ours, hand in run["ours_and_hand_seconds"]]
    return {
        "case": name,
        "strategy": strategy,
        "measured ms": 1e3 * seconds,
        "predicted ms": 1e3 * told["seconds"],
        "error": told["seconds"] / seconds - 1,
        "catalogue error": told["catalogue seconds"] / seconds - 1,
        "measured MiB": size / 2**20,
        "memory error": told["bytes"] / size - 1,
        "catalogue memory error": told["catalogue bytes"] / size - 1,
        "dry run memory error": told["dry bytes"] / size - 1,
        "time over by hand": median(ratios),
        "memory over by hand": size / run["hand_bytes"],
    }


def summary(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Median absolute errors, and the median ratios to the step by hand."""
    errors = [key for key in rows[0] if key.endswith("error")]
    return {
        **{f"median {key}": median([abs(each[key]) for each in rows]) for key in errors},
        **{f"median {key}": median([each[key] for each in rows]) for key in rows[0] if key.endswith("by hand")},
        "aimed at, time": TARGET_TIME,
        "aimed at, memory": TARGET_MEMORY,
        "aimed at, time over by hand": TARGET_RATIO,
    }


if __name__ == "__main__":
    main()
