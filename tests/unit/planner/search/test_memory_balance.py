"""Stages that are cut by what fits: they fit as the program has them, and are as equal as they can be."""

from __future__ import annotations

import math
from itertools import combinations, pairwise

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.planner.constraints import Constraints
from shardwise.planner.explain import explanation
from shardwise.planner.search.memory_balance import evened, least_share, level
from shardwise.planner.search.search import search
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.crosscheck import crosscheck
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.splitting.balance import divided
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.workload import Workload

SPEC = "gpt:layers=12,hidden=256,heads=4,vocabulary=512,sequence=128,batch_size=16,precision=float32"


@pytest.fixture(scope="module")
def workload() -> Workload:
    return load_workload(SPEC)


def needs(costs: Costs) -> list[int]:
    return [costs.memory_at(worker).total for worker in costs.parts.workers]


@pytest.mark.parametrize(
    ("most", "found"),
    [([1.0, 1.0], 0.5), ([0.25, 1.0, 1.0], 0.375), ([0.2, 0.3, 0.5], 0.5), ([0.2, 0.3, 0.4], None), ([math.inf], 1.0)],
)
def test_level(most: list[float], found: float | None) -> None:
    assert level(most) == (None if found is None else pytest.approx(found))


@pytest.mark.parametrize("share", [0.1, 0.3, 0.6, 0.9])
def test_the_fullest_worker_gets_less(profiles: ScaledProfiles, cluster: Cluster, share: float) -> None:
    strategy = Strategy(pp=4, microbatches=16)
    profile = profiles.of(strategy)
    equal = costs_of(profile, strategy, cluster)
    need = needs(equal)
    room = round(share * max(need) + (1 - share) * sum(need) / len(need))
    found = evened(profile, strategy, cluster, room)
    assert found is not None
    assert found.with_(speeds="") == strategy
    uneven = costs_of(profile, found, cluster)
    assert max(needs(uneven)) <= room < max(need)
    assert uneven.step_seconds >= equal.step_seconds
    least = least_share(profiles.summary(strategy), strategy, cluster.device(0), room)
    assert least is not None
    times = equal.times
    every = sum(
        sums.between(0, len(profile.segments)).device for sums in (times.forward, times.backward, times.weights)
    )
    assert strategy.microbatches * least * every <= uneven.step_seconds


def test_no_other_cut_that_fits_is_faster(profiles: ScaledProfiles, cluster: Cluster) -> None:
    """All ways to cut between blocks into two stages, and into three."""
    for workers in (2, 3):
        strategy = Strategy(pp=workers, microbatches=16)
        profile = profiles.of(strategy)
        need = needs(costs_of(profile, strategy, cluster))
        room = round(0.9 * max(need) + 0.1 * sum(need) / len(need))
        found = evened(profile, strategy, cluster, room)
        assert found is not None
        least = min(segment.message for segment in profile.segments[1:])
        narrow = [
            pipeline_rank
            for pipeline_rank, segment in enumerate(profile.segments)
            if pipeline_rank and segment.message == least
        ]
        sums = costs_of(profile, strategy, cluster).times.forward
        parts = {}
        for starts in combinations(narrow, workers - 1):
            bounds = [0, *starts, len(profile.segments)]
            sizes = [sums.between(a, b).device for a, b in pairwise(bounds)]
            spelled = ":".join(str(max(1, round(1000 * size / max(sizes)))) for size in sizes)
            costs = costs_of(profile, strategy.with_(speeds=spelled), cluster)
            if max(needs(costs)) <= room:
                parts[spelled] = costs.step_seconds
        assert parts
        assert costs_of(profile, found, cluster).step_seconds <= 1.001 * min(parts.values())


def test_too_little_for_any_cut(profiles: ScaledProfiles, cluster: Cluster) -> None:
    strategy = Strategy(pp=4, microbatches=16)
    room = min(needs(costs_of(profiles.of(strategy), strategy, cluster))) // 2
    assert evened(profiles.of(strategy), strategy, cluster, room) is None


def test_what_fits_with_equal_stages_stays(profiles: ScaledProfiles, cluster: Cluster) -> None:
    strategy = Strategy(pp=4, microbatches=16)
    assert evened(profiles.of(strategy), strategy, cluster, cluster.device(0).memory_bytes) is None


def test_the_search_finds_it_and_the_program_fits(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster
) -> None:
    """Where nothing may be computed again, and equal stages need too much."""
    fixed = {"pp": "4", "schedule": "1f1b", "microbatches": "16", "recompute": "none"}
    strategy = Strategy(pp=4, microbatches=16)
    need = needs(costs_of(profiles.of(strategy), strategy, cluster))
    room = round(0.5 * max(need) + 0.5 * sum(need) / len(need))
    searched = search(workload, cluster, 4, Constraints(max_memory=room, fixed=fixed), profiles)
    best = searched.plan.best
    assert best is not None
    assert best.strategy.speeds
    assert best.prediction.memory.total <= room
    run = crosscheck(profiles.traced, best.strategy, cluster)
    assert run.run.memory.total <= 1.05 * room
    words = " ".join(explanation(searched.plan, cluster, searched.profile_of))
    assert f"speeds={best.strategy.speeds} gives fewer layers" in words
    forbidden = Constraints(max_memory=room, fixed=fixed, forbidden=(("speeds", ""),))
    assert search(workload, cluster, 4, forbidden, profiles).plan.best is None


def test_stages_that_are_spelled_are_those_that_are_cut() -> None:
    """Costs are nearly whole hundredths."""
    assert divided([1.0] * 10, [0.0] * 9, 2, "gpu", speeds=(43, 57), in_blocks=False) == [[0], [4]]
