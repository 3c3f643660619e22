"""Cost of recording how long each worker is busy (`ranks.jsonl`): a step with it over the same step without.

Both run in the same workers (one thread each) on the same batches and take turns step by step; the ratio of a repeat is
the median over its rounds, the result the median over repeats. On a machine that others use, too, a ratio of steps
says little about a hundredth. So the processor time of the recording alone is measured beside it, in the slowest
worker: that of noting a step, with its share of the messages and lines, and that of all waits of a step. Target for its
share of a step: at most 0.01.

    python -m benchmarks.recording [--rounds N] [--repeats N] [--strategy SPEC ...]
"""

from __future__ import annotations

import argparse
import itertools
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.harness import alternate, environment, median, record
from shardwise.launch.local import run_local

TARGET = 0.01
STRATEGIES = ("dp=2", "fsdp=2", "tp=2", "pp=2")


def measure(spec: str, rounds: int, folder: str) -> tuple[list[list[float]], float]:
    """Return seconds of a step with and without recording in each round, and processor seconds of recording a step."""
    import time

    import torch
    import torch.distributed as dist

    from shardwise import Strategy
    from shardwise.launch import waiting
    from shardwise.parallel.program import Program
    from shardwise.run.control_group import Workers
    from shardwise.run.training.rank_times import RankTimes
    from shardwise.workload.load import load_workload

    program = Program.build(load_workload("image", {}), Strategy.parse(spec))
    shares = itertools.cycle(list(program.loader().shares(0))[:-1])  # the last one is smaller
    times = RankTimes(Workers(), gpu=False)
    if program.mesh.rank == 0:
        times.write_to(Path(folder) / "ranks.jsonl", 0)
    steps, spent, waits = itertools.count(1), [], []

    def recorded() -> None:
        with waiting.counting(), waiting.recorded() as found:
            times.resume()
            float(program.step_share(next(shares)))
            waits.append(len(found))
            begin = time.thread_time()
            times.add(next(steps))
            spent.append(time.thread_time() - begin)

    def plain() -> None:
        float(program.step_share(next(shares)))

    seconds = alternate([recorded, plain], rounds)
    times.close()
    mine = sum(spent) / len(spent) + sum(waits) / len(waits) * _wait_seconds()
    slowest = torch.tensor(mine, dtype=torch.float64)
    dist.all_reduce(slowest, op=dist.ReduceOp.MAX)
    return seconds, float(slowest)


def _wait_seconds() -> float:
    """Return the processor seconds by which a wait takes longer when it is counted."""
    import time

    import torch.distributed as dist

    from shardwise.launch import waiting

    calls = 20_000
    done = dist.barrier(async_op=True)
    done.wait()

    def run() -> float:
        begin = time.thread_time()
        for _ in range(calls):
            done.wait()
        return (time.thread_time() - begin) / calls

    plain = run()
    with waiting.counting():
        return max(0.0, run() - plain)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--strategy", action="append", default=[])
    options = parser.parse_args()
    before = environment(1)
    rows: list[dict[str, Any]] = []
    measured: dict[str, Any] = {}
    for spec in options.strategy or STRATEGIES:
        repeats, recording = [], []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                seconds, spent = run_local(measure, (spec, options.rounds, folder), workers=2)
            repeats.append(seconds)
            recording.append(spent)
        ratios = [median([ours / plain for ours, plain in repeat]) for repeat in repeats]
        pairs = [pair for repeat in repeats for pair in repeat]
        share = median(recording) / min(plain for _, plain in pairs)  # of the shortest step: the largest share
        rows.append(
            {
                "strategy": spec,
                "recorded_step_seconds": median([ours for ours, _ in pairs]),
                "plain_step_seconds": median([plain for _, plain in pairs]),
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "recording_seconds": median(recording),
                "share": share,
                "met": "yes" if share <= TARGET else "no",
            }
        )
        measured[spec] = {"recorded_and_plain_seconds": repeats, "recording_seconds": recording}
    settings = {"rounds": options.rounds, "repeats": options.repeats, "target": TARGET}
    record("recording", settings, rows, measured, before)


if __name__ == "__main__":
    main()
