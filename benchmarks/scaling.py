"""Samples per second of two workers with one thread each (dp=2) over one worker with one thread.

All lives in two worker processes and takes turns step by step, on the same model and the same global batch:

    one      one worker alone does the whole batch; the other sleeps
    two      both train it with dp=2
    control  both do half of it at the same time with nothing between them: what the two cores can give

The ratio of a repeat is the median over its rounds, the result the median over repeats. Target: at least 1.8 where two
cores are free, which the control shows: on free cores it is close to 2.

    python -m benchmarks.scaling [--rounds N] [--repeats N]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from typing import Any

from benchmarks.harness import alternate, environment, median, record
from benchmarks.transformer import Size
from shardwise.launch.local import run_local

TARGET = 1.8
WHAT = ("one worker", "two workers, dp=2", "control: two alone")


def measure(size: Size, rounds: int) -> list[list[float]]:
    """One repeat, in both workers. Returns seconds of (one, two, control) per round."""
    import torch
    import torch.distributed as dist

    from benchmarks.by_hand import plain_loop
    from benchmarks.transformer import transformer_workload
    from shardwise import Strategy
    from shardwise.parallel.program import Program

    workload = transformer_workload(size)
    program = Program.build(workload, Strategy(dp=2))
    torch.manual_seed(workload.seed)
    alone = plain_loop(workload.model(), workload.optimizer)
    shares = itertools.cycle(list(program.loader().shares(0)))
    inputs, targets = (column[: size.batch] for column in workload.dataset.tensors)
    half = size.batch // 2

    def one() -> None:
        if dist.get_rank() == 0:
            alone(inputs, targets)

    def two() -> None:
        program.step_share(next(shares))

    def control() -> None:
        alone(inputs[:half], targets[:half])

    return alternate([one, two, control], rounds)


def _row(name: str, batch: int, repeats: list[list[list[float]]], place: int) -> dict[str, Any]:
    ratios = [median([row[0] / row[place] for row in rounds]) for rounds in repeats]
    return {
        "what": name,
        "samples_per_second": batch / median([row[place] for rounds in repeats for row in rounds]),
        "speedup": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--name", default="scaling", help="of the files in results/")
    options = parser.parse_args()
    size = Size(hidden=options.hidden, layers=options.layers, batch=options.batch)
    before = environment(threads=1)
    repeats = [run_local(measure, (size, options.rounds), workers=2, threads=1) for _ in range(options.repeats)]
    rows = [_row(name, size.batch, repeats, place) for place, name in enumerate(WHAT)]
    settings = {**asdict(size), "rounds": options.rounds, "repeats": options.repeats, "target": TARGET}
    record(options.name, settings, rows, repeats, before)


if __name__ == "__main__":
    main()
