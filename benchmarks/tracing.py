"""Time and memory to trace and cut a Llama whose parameters are on the meta device.

Each size in a process of its own: traced on two sequences of 2,048 tokens, cut for tp=8, places for a pipeline found,
the cost of each layer counted. Targets: 32 layers in less than 15 s and 2 GiB, whatever their width.

    python -m benchmarks.tracing [--repeats N]
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from itertools import pairwise
from typing import Any

from benchmarks.harness import environment, median, record

SIZES = ((32, 4096), (32, 16384), (126, 16384))
"""(layers, hidden): Llama 3 8B, one as wide as 405B, and 405B."""

MOST_SECONDS, MOST_BYTES = 15.0, 2 * 2**30


def measure(layers: int, hidden: int) -> dict[str, Any]:
    import resource
    import time

    import torch
    import torch.nn.functional as F
    import transformers

    from shardwise import Workload
    from shardwise.parallel.check import split
    from shardwise.parallel.pipeline.cut_points import find_cut_points, uses
    from shardwise.parallel.pipeline.divide import counted
    from shardwise.workload.trace.graph import trace
    from shardwise.workload.weight_files import without_parameters

    config = transformers.LlamaConfig(
        vocab_size=128256,
        hidden_size=hidden,
        intermediate_size=14336 * hidden // 4096,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 128,
        num_key_value_heads=8,
        use_cache=False,
    )
    clock = [time.perf_counter()]
    with without_parameters():
        model = transformers.LlamaForCausalLM(config).train()
    clock.append(time.perf_counter())
    workload = Workload(
        name="llama",
        model=lambda: model,
        dataset=[torch.zeros(2049, dtype=torch.long)] * 2,
        inputs=lambda batch: {"input_ids": batch[:, :-1]},
        loss=lambda output, batch: F.cross_entropy(output.logits.flatten(0, 1), batch[:, 1:].flatten()),
        optimizer=torch.optim.AdamW,
        batch_size=2,
    )
    step = trace(workload, model, torch.zeros(2, 2049, dtype=torch.long))
    clock.append(time.perf_counter())
    parameters = dict(model.named_parameters())
    local, _ = split(step, 8, frozenset(parameters))
    found = find_cut_points(local, parameters)
    clock.append(time.perf_counter())
    counted(step, uses(step.graph, step.tensors, parameters))
    clock.append(time.perf_counter())
    build, traced, cut, count = (end - start for start, end in pairwise(clock))
    return {
        "parameters": sum(parameter.numel() for parameter in parameters.values()),
        "build_seconds": build,
        "trace_seconds": traced,
        "cut_seconds": cut,
        "count_seconds": count,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "sharded_share": local.sharded_share(parameters),
        "places": len(found),
    }


def summarize(layers: int, hidden: int, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    row = {key: median([repeat[key] for repeat in repeats]) for key in repeats[0]}
    total = row["trace_seconds"] + row["cut_seconds"] + row["count_seconds"]
    met = layers > 32 or (total < MOST_SECONDS and row["peak_bytes"] < MOST_BYTES)
    return {"layers": layers, "hidden": hidden, **row, "total_seconds": total, "met": "yes" if met else "no"}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--name", default="tracing", help="of the files in results/")
    parser.add_argument("--one", nargs=2, type=int, metavar=("LAYERS", "HIDDEN"), help="one size, as JSON")
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(*options.one)))
        return
    before = environment(threads=1)
    measured = {}
    for layers, hidden in SIZES:
        command = [sys.executable, "-m", "benchmarks.tracing", "--one", str(layers), str(hidden)]
        runs = [subprocess.run(command, check=True, capture_output=True, text=True) for _ in range(options.repeats)]
        measured[f"{layers} layers, {hidden} wide"] = [json.loads(run.stdout.splitlines()[-1]) for run in runs]
    rows = [summarize(*size, repeats) for size, repeats in zip(SIZES, measured.values(), strict=True)]
    record(options.name, {"repeats": options.repeats}, rows, measured, before)


if __name__ == "__main__":
    main()
