"""Our step time over that of the same strategy written by hand with torch's parts.

Both live in the same two workers (one thread each), train the same model on the same batches, and take turns step by
step; the ratio of a repeat is the median over its rounds, the result the median over repeats. Both must end with the
same loss. Target: at most 1.02.

    python -m benchmarks.overhead [--rounds N] [--repeats N] [--strategy SPEC ...]
"""

from __future__ import annotations

import argparse
import itertools
from dataclasses import asdict
from typing import Any

from benchmarks.harness import alternate, environment, median, record
from benchmarks.transformer import Size
from shardwise.launch.local import run_local

TARGET = 1.02
STRATEGIES = ("dp=2", "fsdp=2,zero=2", "fsdp=2", "tp=2", "tp=2,sp=1", "pp=2,microbatches=4")
SAME_LOSS = 1e-4


def measure(spec: str, size: Size, rounds: int, repeat: int) -> dict[str, Any]:
    """One repeat of one strategy, in every worker. Returns seconds per round and the last losses of both."""
    import torch
    import torch.distributed as dist

    from benchmarks.by_hand import BY_HAND
    from benchmarks.transformer import Transformer, transformer_workload
    from shardwise import Strategy
    from shardwise.parallel.program import Program

    workload = transformer_workload(size)
    torch.manual_seed(workload.seed)
    model = workload.model()
    assert isinstance(model, Transformer)
    hand_step = BY_HAND[spec](model, workload.optimizer)
    program = Program.build(workload, Strategy.parse(spec))
    shares = list(program.loader().shares(0))
    losses: dict[str, Any] = {}

    ours_turn, hand_turn = itertools.cycle(shares), itertools.cycle([_joined(share) for share in shares])

    def ours() -> None:
        losses["ours"] = program.step_share(next(ours_turn))

    def by_hand() -> None:
        losses["hand"] = hand_step(*next(hand_turn))

    first, second = (ours, by_hand) if repeat % 2 == 0 else (by_hand, ours)
    seconds = alternate([first, second], rounds)
    pairs = seconds if repeat % 2 == 0 else [[b, a] for a, b in seconds]
    # one worker's own loss by hand; the mean over the replicas, or of the stage that has one, is the global one
    hand = losses["hand"]
    total = torch.tensor([0.0 if hand is None else float(hand), 0.0 if hand is None else 1.0])
    dist.all_reduce(total)
    return {"ours_and_hand_seconds": pairs, "loss": float(losses["ours"]), "hand_loss": float(total[0] / total[1])}


def _joined(share: Any) -> Any:
    """Inputs and targets of a share as one batch, which is what the hand-written step takes."""
    import torch

    return tuple(torch.cat(parts) for parts in zip(*(m.data for m in share.microbatches), strict=True))


def summarize(spec: str, repeats: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [median([ours / hand for ours, hand in repeat["ours_and_hand_seconds"]]) for repeat in repeats]
    seconds = [pair for repeat in repeats for pair in repeat["ours_and_hand_seconds"]]
    difference = max(abs(repeat["loss"] - repeat["hand_loss"]) / repeat["hand_loss"] for repeat in repeats)
    if difference > SAME_LOSS:
        raise SystemExit(f"{spec}: the two programs do not train alike, their losses differ by {difference:.1e}")
    return {
        "strategy": spec,
        "ours_step_seconds": median([ours for ours, _ in seconds]),
        "hand_step_seconds": median([hand for _, hand in seconds]),
        "ratio": median(ratios),
        "lowest": min(ratios),
        "highest": max(ratios),
        "loss_difference": difference,
        "met": "yes" if median(ratios) <= TARGET else "no",
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--strategy", action="append", choices=STRATEGIES)
    parser.add_argument("--hidden", type=int, default=Size.hidden)
    parser.add_argument("--layers", type=int, default=Size.layers)
    parser.add_argument("--name", default="overhead", help="of the files in results/")
    options = parser.parse_args()
    size = Size(hidden=options.hidden, layers=options.layers)
    before = environment(threads=1)
    measured: dict[str, list[dict[str, Any]]] = {spec: [] for spec in options.strategy or STRATEGIES}
    for repeat in range(options.repeats):
        for spec, repeats in measured.items():
            repeats.append(run_local(measure, (spec, size, options.rounds, repeat), workers=2, threads=1))
    rows = [summarize(spec, repeats) for spec, repeats in measured.items()]
    settings = {**asdict(size), "workers": 2, "rounds": options.rounds, "repeats": options.repeats}
    record(options.name, {**settings, "target": TARGET}, rows, measured, before)


if __name__ == "__main__":
    main()
