"""The Pareto front of time and memory: for each amount of memory the fastest strategy that fits in it.

    the fastest that fits -> the fastest that needs less memory than that -> ... -> nothing fits

Each step is a complete search. No strategy is faster than one on the front without needing more memory, except for
strategies whose memory lies between two steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.planner.plan import Candidate, Plan
from shardwise.planner.search.search import SearchResult, search
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.workload.workload import Workload

STEP = 0.05
"""Least fraction of memory by which each strategy on the front must need less than the one before."""


def front(workload: Workload, cluster: Cluster, searched: SearchResult) -> list[Candidate]:
    """Return the strategies on the front, fastest first; empty if nothing fits.

    Args:
        workload: workload to train.
        cluster: cluster to train on.
        searched: an earlier search, whose devices, constraints and profiles are used; its plan is reused if its
            objective is time.

    Raises:
        WorkloadError, DataError: the workload cannot be profiled at all.
    """
    plan = searched.plan
    constraints = replace(plan.constraints, objective="time")
    if plan.constraints.objective == "memory":
        plan = search(workload, cluster, plan.workers, constraints, searched.scaled).plan
    return undominated(list(_smaller_and_smaller(workload, cluster, plan, searched.scaled)))


def _smaller_and_smaller(
    workload: Workload, cluster: Cluster, plan: Plan, profiles: ScaledProfiles
) -> Iterator[Candidate]:
    constraints = replace(plan.constraints, objective="time")
    while plan.best is not None:
        yield plan.best
        less = int(plan.best.prediction.memory.total * (1 - STEP))
        plan = search(workload, cluster, plan.workers, replace(constraints, max_memory=less), profiles).plan


def undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Return the Pareto-optimal candidates, fastest first.

    A plan's choice may be dominated: within the precision of predictions, a strategy with fewer words is preferred.
    """
    found: list[Candidate] = []
    for each in sorted(candidates, key=lambda c: (c.prediction.step_seconds, c.prediction.memory.total)):
        if not found or each.prediction.memory.total < found[-1].prediction.memory.total:
            found.append(each)
    return found
