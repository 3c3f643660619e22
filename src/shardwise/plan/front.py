"""The Pareto front of time and memory: for each amount of memory the fastest strategy that does with it.

    the fastest that fits -> the fastest that needs less memory than that -> ... -> nothing fits

Each step is a search of its own, so that the front is as exact as these: no strategy is faster than one on it and needs
no more memory, but for what is between two steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.plan.plan import Candidate, Plan
from shardwise.plan.search import Searched, search
from shardwise.predict.scaled import ScaledProfiles
from shardwise.workload.workload import Workload

STEP = 0.05
"""Of the memory of a strategy on the front, the least by which the next one must need less."""


def front(workload: Workload, cluster: Cluster, searched: Searched) -> list[Candidate]:
    """The strategies of the front, fastest first; none where nothing fits.

    Args:
        workload: what to train.
        cluster: on what.
        searched: an earlier search, whose devices and constraints are taken, and its plan where that is for time.

    Raises:
        WorkloadError, DataError: the workload cannot be profiled at all.
    """
    plan = searched.plan
    wish = replace(plan.wish, objective="time")
    if plan.wish.objective == "memory":
        plan = search(workload, cluster, plan.workers, wish, searched.scaled).plan
    return undominated(list(_smaller_and_smaller(workload, cluster, plan, searched.scaled)))


def _smaller_and_smaller(
    workload: Workload, cluster: Cluster, plan: Plan, profiles: ScaledProfiles
) -> Iterator[Candidate]:
    wish = replace(plan.wish, objective="time")
    while plan.best is not None:
        yield plan.best
        less = int(plan.best.prediction.memory.total * (1 - STEP))
        plan = search(workload, cluster, plan.workers, replace(wish, max_memory=less), profiles).plan


def undominated(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Those than which no other is faster without needing more memory, fastest first.

    A plan's choice may be slower than another strategy, where that is as good as equal and needs more words.
    """
    found: list[Candidate] = []
    for each in sorted(candidates, key=lambda c: (c.prediction.step_seconds, c.prediction.memory.total)):
        if not found or each.prediction.memory.total < found[-1].prediction.memory.total:
            found.append(each)
    return found
