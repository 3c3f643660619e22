"""The dry run as judge of a plan's finalists: what the closed form ranked must fit as the real program has it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.plan.plan import Candidate, Plan, Rejected
from shardwise.predict.judging import judged
from shardwise.predict.prediction import Memory
from shardwise.predict.profiling import Profiles
from shardwise.units import format_bytes


def judge(plan: Plan, profiles: Profiles, cluster: Cluster, room: int, finalists: int) -> Plan:
    """A plan whose first candidates have been run dry; those that do not fit as the program has it are rejected.

    Args:
        plan: as it was found.
        profiles: of the workload.
        cluster: that it is for.
        room: bytes of a device.
        finalists: how many are run; more where none of them fits. Strategies with shares stay as they are: replicas
            with unequal shares are not run dry.
    """
    kept: list[Candidate] = []
    rejected: list[Rejected] = []
    smallest: list[Candidate] = [] if plan.smallest is None else [plan.smallest]
    every = iter(plan.candidates)
    for candidate in _run(every, profiles, cluster, finalists, kept):
        size = candidate.prediction.memory.total
        if size <= room:
            kept.append(candidate)
            continue
        smallest.append(candidate)
        reason = f"its dry run needs {format_bytes(size)} of a device, there are {format_bytes(room)}"
        rejected.append(Rejected(candidate.strategy, reason, "memory"))
    if plan.wish.objective == "memory":
        kept.sort(key=lambda each: each.prediction.memory.total)
    return replace(
        plan,
        candidates=(*kept, *every),
        rejected=(*plan.rejected, *rejected),
        smallest=min(smallest, key=lambda each: each.prediction.memory.total, default=None),
    )


def _run(
    every: Iterator[Candidate], profiles: Profiles, cluster: Cluster, finalists: int, kept: list[Candidate]
) -> Iterator[Candidate]:
    """The candidates with the memory of their dry runs, until enough of them were run and some are `kept`."""
    for number, candidate in enumerate(every, 1):
        if candidate.strategy.shares:
            yield candidate
        else:
            run = judged(profiles, candidate.strategy, cluster)
            memory = _as_run(candidate.prediction.memory, run.run.memory)
            yield replace(candidate, prediction=replace(candidate.prediction, memory=memory), dry_run=run)
        if number >= finalists and kept:
            return


def _as_run(predicted: Memory, run: Memory) -> Memory:
    """The tensors of a dry run, in a process as it is predicted."""
    return replace(run, process=predicted.process)
