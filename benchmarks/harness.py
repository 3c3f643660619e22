"""Alternating measurements for all benchmarks, and a result that says where it comes from."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def alternate(steps: Sequence[Callable[[], Any]], rounds: int, warmup: int = 3) -> list[list[float]]:
    """Seconds of each of `steps` in each of `rounds`, the slowest worker's; shape (rounds, steps).

    Every round runs all of them, in turn forwards and backwards, so that neither drift nor order favours one.
    A barrier before each keeps the workers' start together. Collective over the default process group.
    """
    import torch
    import torch.distributed as dist

    for step in steps:
        for _ in range(warmup):
            step()
    seconds = torch.zeros(rounds, len(steps), dtype=torch.float64)
    for number in range(rounds):
        order = range(len(steps)) if number % 2 == 0 else reversed(range(len(steps)))
        for which in order:
            dist.barrier()
            start = time.perf_counter()
            steps[which]()
            seconds[number, which] = time.perf_counter() - start
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    result: list[list[float]] = seconds.tolist()
    return result


def median(values: Sequence[float]) -> float:
    return statistics.median(values)


def environment(threads: int | None) -> dict[str, Any]:
    """Return the facts that a number depends on besides the code, and set the threads of each worker.

    None: each worker gets its equal share of the cores.
    """
    os.environ.pop("OMP_NUM_THREADS", None)
    if threads is not None:
        os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("SHARDWISE_CLUSTER", "off")  # predictions before a run would only take time
    return {
        "command": " ".join(["python", *sys.orig_argv[1:]]),
        "date": time.strftime("%Y-%m-%d"),
        "cpus": os.cpu_count(),
        "threads_per_worker": threads or "an equal share of the cores",
        "load_before": round(os.getloadavg()[0], 2),
        "processor": _processor(),
        "python": platform.python_version(),
        "torch": version("torch"),
        "shardwise": version("shardwise"),
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(":")[2].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if info.exists() and names else platform.machine()


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table with the keys of the first row as its head."""
    keys = list(rows[0])
    cells = [keys, *[[_text(row[key]) for key in keys] for row in rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(keys))]
    cells.insert(1, ["-" * width for width in widths])
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    return "\n".join(f"| {' | '.join(row)} |" for row in padded)


def _text(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def record(
    name: str, settings: Mapping[str, Any], rows: Sequence[Mapping[str, Any]], measured: Any, before: Mapping[str, Any]
) -> None:
    """Prints the rows as a table and writes them, with all that was measured, to results/<name>.json and .md."""
    RESULTS.mkdir(exist_ok=True)
    text = table(rows)
    document = {**before, "settings": dict(settings), "rows": list(rows), "measured": measured}
    (RESULTS / f"{name}.json").write_text(json.dumps(document, indent=1) + "\n")
    facts = "\n".join(f"- {key}: {value}" for key, value in {**before, **settings}.items())
    (RESULTS / f"{name}.md").write_text(f"# {name}\n\n{facts}\n\n{text}\n")
    print(text)
