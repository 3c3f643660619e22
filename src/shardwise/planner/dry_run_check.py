"""Check a plan's finalists by dry runs: strategies that the closed form ranked must fit in the real program too."""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.planner.plan import Candidate, Plan, Rejected
from shardwise.predict.crosscheck import crosscheck
from shardwise.predict.profile.source import ProfileSource
from shardwise.units import format_bytes


def judge(plan: Plan, profiles: ProfileSource, cluster: Cluster, room: int, finalists: int) -> Plan:
    """Return the plan with its first candidates dry-run; those that do not fit in the dry run are rejected.

    Args:
        plan: plan to check.
        profiles: profiles of the workload.
        cluster: cluster of the plan.
        room: bytes of a device that a strategy may use.
        finalists: number of candidates to dry-run; more if none of them fits. Strategies with shares are taken as
            they are, because replicas with unequal shares cannot be dry-run.
    """
    fitting: list[Candidate] = []
    rejected: list[Rejected] = []
    smallest: list[Candidate] = [] if plan.smallest is None else [plan.smallest]
    every = iter(plan.candidates)
    for number, candidate in enumerate(every, 1):
        run = _run(candidate, profiles, cluster)
        size = run.prediction.memory.total
        if size <= room:
            fitting.append(run)
        else:
            smallest.append(run)
            reason = f"its dry run needs {format_bytes(size)} of a device, there are {format_bytes(room)}"
            rejected.append(Rejected(run.strategy, reason, "memory"))
        if number >= finalists and fitting:
            break
    if plan.constraints.objective == "memory":
        fitting.sort(key=lambda each: each.prediction.memory.total)
    return replace(
        plan,
        candidates=(*fitting, *every),
        rejected=(*plan.rejected, *rejected),
        smallest=min(smallest, key=lambda each: each.prediction.memory.total, default=None),
    )


def _run(candidate: Candidate, profiles: ProfileSource, cluster: Cluster) -> Candidate:
    """Dry-run a candidate and replace its tensors by those of the dry run; other memory stays as predicted."""
    if candidate.strategy.shares:
        return candidate
    run = crosscheck(profiles, candidate.strategy, cluster)
    prediction = candidate.prediction
    own = prediction.memory
    memory = replace(run.run.memory, process=own.process, fragments=own.fragments, context=own.context)
    return replace(candidate, prediction=replace(prediction, memory=memory), dry_run=run)
