"""Collectives through shared memory and by gloo, in turns, between workers of this machine.

    python -m benchmarks.transport [--rounds N] [--turns N] [--workers N ...]

Each round runs every collective on a group of each kind. `times` is how many times faster shared memory is. The second
part trains the recipes with the workers of one kind, then the other.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from typing import Any

from benchmarks.harness import alternate, environment, median, record
from shardwise.launch.local import run_local
from shardwise.launch.shared_memory.choice import GLOO, SETTING, SHM

SIZES = (4 * 2**10, 64 * 2**10, 2**20, 8 * 2**20, 64 * 2**20)
OPERATIONS = ("all_reduce", "reduce_scatter", "all_gather", "broadcast", "send")
RUNS = tuple(
    (recipe, f"{axis}=2") for recipe in ("image", "language", "medical") for axis in ("dp", "fsdp", "tp", "pp")
)
STEPS, WARMUP = 24, 4


def call(operation: str, size: int, group: Any) -> Callable[[], None]:
    """Return a call of a collective, or of a message there and back."""
    import torch
    import torch.distributed as dist

    rank, count = dist.get_rank(), dist.get_world_size()
    whole = torch.zeros(size // 4)
    parts = list(whole.chunk(count))
    if operation == "all_reduce":
        return lambda: dist.all_reduce(whole, group=group)
    if operation == "broadcast":
        return lambda: dist.broadcast(whole, 0, group=group)
    if operation == "reduce_scatter":
        part = torch.empty_like(parts[0])
        return lambda: dist.reduce_scatter(part, parts, group=group)
    if operation == "all_gather":
        mine = parts[rank].clone()
        return lambda: dist.all_gather(parts, mine, group=group)

    def there_and_back() -> None:
        if rank < 2:
            for sender in (0, 1):
                if rank == sender:
                    dist.send(whole, 1 - rank, group)
                else:
                    dist.recv(whole, 1 - rank, group)

    return there_and_back


def measured(rounds: int) -> dict[str, list[list[float]]]:
    """Return seconds of (shared memory, gloo) in each round, by operation and bytes. Collective."""
    import torch.distributed as dist

    from shardwise.launch.shared_memory.registration import register

    groups = (dist.new_group(backend=register()), dist.new_group(backend=GLOO))
    found = {}
    for size in SIZES:
        for operation in OPERATIONS:
            steps = [call(operation, size, group) for group in groups]
            found[f"{operation} {size}"] = alternate(steps, rounds if size < 2**25 else max(5, rounds // 4))
    return found


def trained(recipe: str, strategy: str) -> list[float]:
    """Return the seconds of each step, on a worker."""
    import time

    from shardwise.parallel.program import Program
    from shardwise.strategy import Strategy
    from shardwise.workload.load import load_workload

    program = Program.build(load_workload(recipe), Strategy.parse(strategy))
    share = next(program.loader().shares(0))
    found = []
    for _ in range(WARMUP + STEPS):
        start = time.perf_counter()
        program.step_share(share)
        found.append(time.perf_counter() - start)
    return found[WARMUP:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--turns", type=int, default=3, help="trainings of each kind; 0: none")
    parser.add_argument("--workers", type=int, nargs="+", default=[2, 4])
    options = parser.parse_args()
    before = environment(threads=None)
    rows: list[dict[str, Any]] = []
    everything: dict[str, Any] = {}
    for workers in options.workers:
        found = run_local(measured, (options.rounds,), workers=workers)
        everything[f"{workers} workers"] = found
        for name, rounds in found.items():
            shm, gloo = (1e3 * median([each[kind] for each in rounds]) for kind in (0, 1))
            rows.append({"what": name, "workers": workers, "ms shm": shm, "ms gloo": gloo, "times": gloo / shm})
    for recipe, strategy in RUNS if options.turns else ():
        seconds: dict[str, list[float]] = {SHM: [], GLOO: []}
        for _ in range(options.turns):
            for kind, took in seconds.items():
                os.environ[SETTING] = kind
                took.append(median(run_local(trained, (recipe, strategy), workers=2)))
        del os.environ[SETTING]
        everything[f"{recipe} {strategy}"] = seconds
        shm, gloo = (1e3 * median(seconds[kind]) for kind in (SHM, GLOO))
        rows.append({"what": f"{recipe} {strategy}", "workers": 2, "ms shm": shm, "ms gloo": gloo, "times": gloo / shm})
    record("transport", {"rounds": options.rounds, "turns": options.turns}, rows, everything, before)


if __name__ == "__main__":
    main()
