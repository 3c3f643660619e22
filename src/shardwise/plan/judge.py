"""The dry run as judge of a plan's finalists: what the closed form ranked must fit as the real program has it."""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.plan.plan import Candidate, Plan, Rejected
from shardwise.predict.judging import judged
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
    for number, candidate in enumerate(every, 1):
        run = _run(candidate, profiles, cluster)
        size = run.prediction.memory.total
        if size <= room:
            kept.append(run)
        else:
            smallest.append(run)
            reason = f"its dry run needs {format_bytes(size)} of a device, there are {format_bytes(room)}"
            rejected.append(Rejected(run.strategy, reason, "memory"))
        if number >= finalists and kept:
            break
    if plan.wish.objective == "memory":
        kept.sort(key=lambda each: each.prediction.memory.total)
    return replace(
        plan,
        candidates=(*kept, *every),
        rejected=(*plan.rejected, *rejected),
        smallest=min(smallest, key=lambda each: each.prediction.memory.total, default=None),
    )


def _run(candidate: Candidate, profiles: Profiles, cluster: Cluster) -> Candidate:
    """With the tensors of a dry run, in a process as it is predicted."""
    if candidate.strategy.shares:
        return candidate
    run = judged(profiles, candidate.strategy, cluster)
    prediction = candidate.prediction
    memory = replace(run.run.memory, process=prediction.memory.process)
    return replace(candidate, prediction=replace(prediction, memory=memory), dry_run=run)
