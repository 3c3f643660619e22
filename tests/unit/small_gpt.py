"""A GPT that is small enough to try every strategy of it."""

from __future__ import annotations

from shardwise.planner.constraints import Constraints
from shardwise.planner.search.space import divisors, families, members
from shardwise.predict.profile.profile import Profile
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


def can_be_cut(profile: Profile, strategy: Strategy) -> bool:
    """Return whether there are as many segments as stages: with tp there are fewer than on one worker."""
    return strategy.pp * strategy.stages_per_worker <= len(profile.segments)
