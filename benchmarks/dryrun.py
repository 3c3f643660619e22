"""Time and memory of a dry run: one worker of 16,384 that train 405 B parameters.

Each strategy in a process of its own, on one core: the real program is built and runs two steps on torch's
fake process group. Targets: less than 60 s of processor time and 4 GiB.

    python -m benchmarks.dryrun [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks.harness import environment, median, record

MODEL = {"layers": 126, "hidden": 16384, "heads": 128, "kv_heads": 8, "ffn": 53248, "vocabulary": 128256}
"""Llama 3 405B."""

RUNS = (
    ("dp=128,pp=16,tp=8", 2048),
    ("dp=128,pp=16,tp=8,sp=1,schedule=zero-bubble,recompute=full", 2048),
    ("fsdp=128,pp=16,tp=8", 2048),
    ("fsdp=2048,tp=8,sp=1", 2048),
    ("fsdp=16384", 16384),
)
"""(strategy, samples of 2,048 tokens in a batch)."""

MOST_SECONDS, MOST_BYTES = 60.0, 4 * 2**30


def measure(strategy: str, batch_size: int) -> dict[str, Any]:
    import os
    import resource
    import time

    os.sched_setaffinity(0, {0})
    from shardwise import Strategy
    from shardwise.predict.dry_run.dry_run import dry_run
    from shardwise.workload.recipes.gpt import gpt

    start = time.perf_counter()
    run = dry_run(gpt(**MODEL, batch_size=batch_size), Strategy.parse(strategy))  # type: ignore[arg-type]
    return {
        "seconds": time.perf_counter() - start,
        "processor_seconds": time.process_time(),
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "kernels": len(run.kernels),
        "collectives": len(run.collectives),
        "flops": run.flops,
        "sent_bytes": sum(collective.bytes for collective in run.collectives),
        "device_bytes": run.memory.total,
    }


def summarize(strategy: str, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    row = {key: median([repeat[key] for repeat in repeats]) for key in repeats[0]}
    met = row["processor_seconds"] < MOST_SECONDS and row["peak_bytes"] < MOST_BYTES
    return {"strategy": strategy, **row, "met": "yes" if met else "no"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--one", nargs=2, metavar=("STRATEGY", "BATCH_SIZE"), help="one run, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one[0], int(options.one[1]))))
        return
    before = environment(threads=1)
    measured = {}
    for strategy, batch_size in RUNS:
        command = [sys.executable, "-m", "benchmarks.dryrun", "--one", strategy, str(batch_size)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(options.repeats)]
        measured[strategy] = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    rows = [summarize(strategy, repeats) for strategy, repeats in measured.items()]
    record("dryrun", {"repeats": options.repeats, **MODEL}, rows, measured, before)


if __name__ == "__main__":
    main()
