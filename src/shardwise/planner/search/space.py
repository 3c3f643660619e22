"""All strategies for a number of workers, as families: the members of a family compute the same on every worker.

A family has the degrees of tp and pp, the schedule, the microbatches and the recomputation. Its members differ in how
replicas store parameters (`dp`, `fsdp` with zero=1|2|3, and combinations of both), and in which axis is outermost where
that matters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

from shardwise.options import FULL, NONE, PRECISIONS, Compression, Recompute
from shardwise.planner.constraints import Constraints
from shardwise.predict.workers.groups import group_of, message_group
from shardwise.strategy import OUTERMOST, Strategy

MOST_STAGES = 8
"""Most stages per worker that are tried with the interleaved schedule."""


def families(
    workers: int,
    batch_size: int,
    constraints: Constraints,
    tensor: Sequence[int],
    segments: int,
    *,
    compile: int = 0,  # noqa: A002  the option's name
) -> Iterator[Strategy]:
    """Yield one strategy for each family, with all replicas as `dp`.

    Args:
        workers: product of the degrees.
        batch_size: global batch size.
        constraints: constraints.
        tensor: degrees of tp that the model can be split into, 1 among them.
        segments: number of segments of its step; 1 if the step cannot be cut.
        compile: value of this option in all of them.
    """
    software = constraints.software
    for tp in divisors(workers):
        if tp not in tensor or not constraints.allows("tp", tp):
            continue
        for pp in divisors(workers // tp):
            replicas = workers // tp // pp
            if pp > segments or batch_size % replicas or not constraints.allows("pp", pp):
                continue
            for family in _of_degrees(tp, pp, replicas, batch_size // replicas, constraints, segments, compile):
                if software is None or software.family_refusal(family) is None:
                    yield family


def _of_degrees(
    tp: int, pp: int, replicas: int, share: int, constraints: Constraints, segments: int, compiled: int
) -> Iterator[Strategy]:
    reduce = constraints.fixed.get("reduce", "") if replicas > 1 else ""
    compress = constraints.fixed.get("compress", "") if replicas > 1 else ""
    if not (constraints.allows("reduce", reduce) and constraints.allows("compress", compress)):
        return
    for microbatches in divisors(share):
        if not constraints.allows("microbatches", microbatches):
            continue
        for schedule, stages in _schedules(pp, microbatches, segments, plain="stages" not in constraints.fixed):
            if not (constraints.allows("schedule", schedule) and constraints.allows("stages", stages)):
                continue
            for recompute in _recomputes(constraints):
                for sp in (1, 0) if tp > 1 else (0,):
                    for precision in _precisions(constraints):
                        if not (constraints.allows("recompute", recompute) and constraints.allows("sp", sp)):
                            continue
                        yield Strategy(
                            dp=replicas,
                            tp=tp,
                            sp=sp,
                            pp=pp,
                            microbatches=microbatches,
                            schedule=schedule,
                            stages=stages,
                            recompute=recompute,
                            precision=precision,
                            reduce=reduce,
                            compress=Compression.parse("compress", compress),
                            plain_steps=int(constraints.fixed.get("plain_steps", 0)) if compress else 0,
                            loss_pieces=int(constraints.fixed.get("loss_pieces", 0)),
                            states=int(constraints.fixed.get("states", 0)),
                            compile=compiled,
                        )


def _recomputes(constraints: Constraints) -> tuple[Recompute, ...]:
    """Return the values of `recompute` to try: none and all of the blocks, unless the user fixed one.

    Parts between them are tried for each strategy that does not fit, see `planner.search.partial_recompute`.
    """
    fixed = constraints.fixed.get("recompute")
    return (NONE, FULL) if fixed is None else (Recompute.parse("recompute", fixed),)


def _precisions(constraints: Constraints) -> tuple[str, ...]:
    """Return the user's precision, or the workload's own (empty): the planner does not change what is computed."""
    return tuple(word for word in PRECISIONS if constraints.fixed.get("precision") == word) or ("",)


def _schedules(pp: int, microbatches: int, segments: int, *, plain: bool) -> Iterator[tuple[str, int]]:
    """Yield (schedule, stages per worker). With `plain`, the default of two interleaved stages is spelled as 0."""
    yield "1f1b", 0
    if pp == 1:
        return
    yield "gpipe", 0
    yield "zero-bubble", 0
    if microbatches % pp == 0:
        for stages in range(2, min(MOST_STAGES, segments // pp) + 1):
            yield "interleaved", 0 if plain and stages == 2 else stages


def members(family: Strategy, constraints: Constraints, spans: Sequence[int] = ()) -> Iterator[Strategy]:
    """Yield the allowed strategies of a family; `spans` as for `spellings`."""
    for spelling in spellings(family, constraints, spans):
        yield family.with_(**spelling)


def spellings(family: Strategy, constraints: Constraints, spans: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Return the options in which the members of a family differ, most sharded first: dp, fsdp, zero, outermost.

    Bucket sizes and offloading are set only if the user fixed them. The best bucket size is searched among the
    finalists; offloading is the last resort.

    Args:
        family: representative of the family, with all replicas as `dp`.
        constraints: constraints.
        spans: spans of the cluster's levels. Placing stages outermost is tried only if it changes which workers share
            a level.
    """
    replicas = family.dp
    outermost = OUTERMOST if replicas > 1 and family.pp > 1 and spans else OUTERMOST[:1]
    fixed = constraints.fixed.get("outermost") or (constraints.software and constraints.software.abilities.orders[0])
    if fixed and family.pp > 1 and replicas > 1:
        outermost = (fixed,)
    found: list[dict[str, Any]] = []
    for fsdp in reversed(divisors(replicas)):
        words = [word for word in outermost if word != "pp" or fixed or not _same_layout(family, fsdp, spans)]
        for zero in (3, 2, 1) if fsdp > 1 else (3,):
            if zero == 1 and fsdp != replicas:
                continue  # the optimizer state is split over all replicas in either spelling
            for word in words:
                spelling: dict[str, Any] = {"dp": replicas // fsdp, "fsdp": fsdp, "zero": zero, "outermost": word}
                spelling |= _asked_for(constraints, family, fsdp, zero)
                if all(constraints.allows(option, value) for option, value in spelling.items()) and (
                    constraints.software is None or constraints.software.refusal(family.with_(**spelling)) is None
                ):
                    found.append(spelling)
    return found


def _asked_for(constraints: Constraints, family: Strategy, fsdp: int, zero: int) -> dict[str, int]:
    """Return bucket and offload as the user fixed them, or 0 where a member of the family does not support them."""
    bucket, offload = (int(constraints.fixed.get(option, 0)) for option in ("bucket", "offload"))
    if bucket or offload:
        member = family.with_(dp=family.dp // fsdp, fsdp=fsdp, zero=zero)
        bucket *= member.sums_in_buckets
        offload *= member.splits_parameters
    return {"bucket": bucket, "offload": offload}


def _same_layout(family: Strategy, fsdp: int, spans: Sequence[int]) -> bool:
    """Return whether each axis has equally many workers within each level, no matter which axis is outermost."""
    plain = family.with_(dp=family.dp // fsdp, fsdp=fsdp)
    other = plain.with_(outermost="pp")
    pairs = [(group_of(plain, axis), group_of(other, axis)) for axis in ("dp", "fsdp", "replicas")] + [
        (message_group(plain, 0, 1), message_group(other, 0, 1))
    ]
    return all(ours.within(span) == theirs.within(span) for ours, theirs in pairs for span in spans)


@lru_cache(maxsize=1024)
def divisors(number: int) -> tuple[int, ...]:
    """Return all divisors of a positive number in ascending order."""
    return tuple(each for each in range(1, number + 1) if number % each == 0)
