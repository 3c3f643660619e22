"""A GPT that is small enough to try every strategy of it."""

from __future__ import annotations

from shardwise.planner.constraints import Constraints
from shardwise.planner.search.space import divisors, families, members
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

SPEC = "gpt:layers=2,hidden=256,heads=4,vocabulary=512,sequence=128,batch_size=4"


def everything(
    workload: Workload, workers: int, constraints: Constraints, links: int, spans: tuple[int, ...] = ()
) -> list[Strategy]:
    """All strategies for so many workers that a search on GPUs goes through."""
    wanted = 0 if constraints.software else int(constraints.fixed.get("compile", 1))
    found = families(workers, workload.batch_size, constraints, divisors(workers), links, compile=wanted)
    return [member for family in found for member in members(family, constraints, spans)]
