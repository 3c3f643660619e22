"""Cost of recording how long each worker is busy (`ranks.jsonl`): a step with it over the same step without.

Both run in the same workers (one thread each) on the same batches and take turns step by step; the ratio of a repeat is
the median over its rounds, the result the median over repeats. Target: at most 1.01.

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

TARGET = 1.01
STRATEGIES = ("dp=2", "fsdp=2", "tp=2", "pp=2")


def measure(spec: str, rounds: int, folder: str) -> list[list[float]]:
    """Return seconds of a step with and without recording in each round; in every worker."""
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
    steps = itertools.count(1)

    def recorded() -> None:
        with waiting.counting():
            times.resume()
            float(program.step_share(next(shares)))
            times.add(next(steps))

    def plain() -> None:
        float(program.step_share(next(shares)))

    seconds = alternate([recorded, plain], rounds)
    times.close()
    return seconds


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
        repeats = []
        for _ in range(options.repeats):
            with tempfile.TemporaryDirectory() as folder:
                repeats.append(run_local(measure, (spec, options.rounds, folder), workers=2))
        ratios = [median([ours / plain for ours, plain in repeat]) for repeat in repeats]
        pairs = [pair for repeat in repeats for pair in repeat]
        rows.append(
            {
                "strategy": spec,
                "recorded_step_seconds": median([ours for ours, _ in pairs]),
                "plain_step_seconds": median([plain for _, plain in pairs]),
                "ratio": median(ratios),
                "lowest": min(ratios),
                "highest": max(ratios),
                "met": "yes" if median(ratios) <= TARGET else "no",
            }
        )
        measured[spec] = repeats
    settings = {"rounds": options.rounds, "repeats": options.repeats, "target": TARGET}
    record("recording", settings, rows, measured, before)


if __name__ == "__main__":
    main()
