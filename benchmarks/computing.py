"""Measure how the ways to compute a step differ: float32, autocast, bf16, compiled parts; predict it for GPUs.

    python -m benchmarks.computing [--rounds N] [--warmup N]

On the CPU the recipes train on one worker, all ways in turns within one process; ratios are medians over the rounds.
On GPUs Llama 3 8B is predicted, 8 samples of 8,192 tokens: bytes that a rank sends in a step, bytes that one microbatch
saves for the backward pass, and the seconds of a step. `autocast` is what `precision=bf16` was before version 0.2.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator
from typing import Any

from benchmarks.harness import environment, median, record
from shardwise.cluster.find import find_cluster
from shardwise.parallel.program import Program
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.workers.traffic import communicated
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload

RECIPES = ("image", "language", "medical")
WAYS = ("precision=float32", "precision=float32,compile=1", "precision=bf16", "precision=bf16,compile=1")

LLAMA = (
    "gpt:layers=32,hidden=4096,heads=32,kv_heads=8,ffn=14336,vocabulary=128256,sequence=8192,tied=False,batch_size=8,"
    "precision=bf16"
)
CLUSTERS = ("a100-80x8", "h100x8")
SPLITS = ("fsdp=8", "tp=8", "tp=8,sp=1", "pp=8,microbatches=8")
COMPUTING = ("precision=autocast", "precision=bf16", "precision=bf16,compile=1")


def shares(program: Program) -> Iterator[Any]:
    """Yield shares of the dataset for ever."""
    epoch = 0
    while True:
        yield from program.loader().shares(epoch)
        epoch += 1


def measured(recipe: str, rounds: int, warmup: int) -> list[dict[str, Any]]:
    """Return the step time of each way on this CPU, and its ratio to float32."""
    programs = [Program.build(load_workload(recipe), Strategy.parse(f"single,{way}")) for way in WAYS]
    data = [shares(program) for program in programs]
    seconds: list[list[float]] = [[] for _ in WAYS]
    for number in range(rounds + warmup):
        order = range(len(WAYS)) if number % 2 == 0 else reversed(range(len(WAYS)))
        for way in order:
            share = next(data[way])
            start = time.perf_counter()
            programs[way].step_share(share)
            if number >= warmup:
                seconds[way].append(time.perf_counter() - start)
    return [
        {
            "recipe": recipe,
            "computes": way,
            "step_ms": 1e3 * median(own),
            "ratio": median([one / plain for one, plain in zip(own, seconds[0], strict=True)]),
        }
        for way, own in zip(WAYS, seconds, strict=True)
    ]


def predicted(cluster: str) -> Iterator[dict[str, Any]]:
    """Yield what each way of computing sends, saves and takes on a cluster."""
    profiles, machine = Profiles(load_workload(LLAMA)), find_cluster(cluster)
    for split in SPLITS:
        for way in COMPUTING:
            strategy = Strategy.parse(f"{split},{way}").for_batch(profiles.workload.batch_size)
            costs = costs_of(profiles.of(strategy), strategy, machine)
            sent = communicated(costs.stages.program)
            yield {
                "cluster": cluster,
                "strategy": split,
                "computes": way,
                "sent_gib": sum(size for _, size in sent.values()) / 2**30,
                "saved_gib": costs.profile.saved[-1] / 2**30,
                "step_s": costs.step_seconds,
                "memory_gib": costs.memory.tensors / 2**30,
            }


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--warmup", type=int, default=3)
    options = parser.parse_args()
    before = environment(threads=2)
    rows = [row for recipe in RECIPES for row in measured(recipe, options.rounds, options.warmup)]
    record("computing", {"rounds": options.rounds, "warmup": options.warmup}, rows, {}, before)
    rows = [row for cluster in CLUSTERS for row in predicted(cluster)]
    record("computing-gpu", {"workload": LLAMA}, rows, {}, before)


if __name__ == "__main__":
    main()
