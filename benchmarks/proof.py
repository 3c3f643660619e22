"""Cost of the proof of the first step: its seconds, and their share of a run of 100 steps, by recipe and strategy.

The proof is that of a run: cold, right after the program is built. Steps are measured after it, in the same workers.
Targets: less than a second, and less than 5% of 100 steps.

    python -m benchmarks.proof [--steps N] [--repeats N] [--recipe NAME ...] [--strategy SPEC ...]
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks.harness import environment, median, record
from shardwise.launch.local import run_local
from shardwise.strategy import Strategy

RECIPES = ("image", "language", "medical")
STRATEGIES = ("single", "dp=2", "fsdp=2", "tp=2", "pp=2", "dp=2,tp=2", "fsdp=2,pp=2")
MOST_SECONDS, MOST_SHARE = 1.0, 0.05
RUN = 100
"""Steps of the run whose time the proof is compared with."""


def measure(recipe: str, spec: str, steps: int) -> dict[str, float]:
    """Prove the first step of a recipe, then take some steps, in every worker. Returns seconds."""
    import time

    from shardwise.parallel.program import Program
    from shardwise.run.verification.first_step import prove_first_step
    from shardwise.workload.load import load_workload

    program = Program.build(load_workload(recipe), Strategy.parse(spec))
    proof = prove_first_step(program)
    assert proof.proved, proof
    seconds = []
    for share in program.loader().shares(0):
        start = time.perf_counter()
        float(program.step_share(share))
        seconds.append(time.perf_counter() - start)
        if len(seconds) > steps:
            break
    return {"proof_seconds": proof.seconds, "step_seconds": median(seconds[1:])}


def row(recipe: str, spec: str, found: list[dict[str, float]]) -> dict[str, Any]:
    proof, step = (median([each[key] for each in found]) for key in ("proof_seconds", "step_seconds"))
    return {
        "recipe": recipe,
        "strategy": spec,
        "proof_seconds": proof,
        "step_seconds": step,
        "share_of_run": proof / (proof + RUN * step),
        "met": "yes" if proof <= MOST_SECONDS and proof <= MOST_SHARE * (proof + RUN * step) else "no",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--recipe", action="append", choices=RECIPES)
    parser.add_argument("--strategy", action="append")
    options = parser.parse_args()
    before = environment(threads=None)
    measured: dict[str, list[dict[str, float]]] = {}
    rows = []
    for recipe in options.recipe or RECIPES:
        for spec in options.strategy or STRATEGIES:
            workers = Strategy.parse(spec).workers
            found = [run_local(measure, (recipe, spec, options.steps), workers=workers) for _ in range(options.repeats)]
            measured[f"{recipe} {spec}"] = found
            rows.append(row(recipe, spec, found))
    settings = {"steps": options.steps, "repeats": options.repeats, "run": RUN, "most_seconds": MOST_SECONDS}
    record("proof", settings, rows, measured, before)


if __name__ == "__main__":
    main()
