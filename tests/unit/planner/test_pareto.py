"""The Pareto front of time and memory against everything there is, and what a search still has to look at."""

from __future__ import annotations

import math
from typing import Any
from unittest import mock

import pytest
from small_gpt import SPEC, can_be_cut, everything

from shardwise import api
from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.planner.constraints import Constraints
from shardwise.planner.equality import WITHIN, are_equal
from shardwise.planner.pareto import STEP, front, undominated
from shardwise.planner.plan import Candidate
from shardwise.planner.search.finalists import Finalists
from shardwise.planner.search.queue import BestSoFar, Queue
from shardwise.planner.search.search import SearchResult, search
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.reports.plan import plan_summary
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

pytestmark = pytest.mark.usefixtures("no_context")

PARTS = ("none", "selective", "full", "1/4", "1/2", "3/4")


@pytest.fixture(scope="module")
def tried(workload: Workload, profiles: ScaledProfiles, cluster: Cluster, no_context: None) -> list[Candidate]:
    """Return predictions of every strategy for 4 devices."""
    segments = len(profiles.of(Strategy()).segments)
    every = {
        member.with_(recompute=again) for member in everything(workload, 4, Constraints(), segments) for again in PARTS
    }
    found = {each: profiles.traced.of(each) for each in every}
    return [Candidate(each, predict(own, each, cluster)) for each, own in found.items() if can_be_cut(own, each)]


@pytest.fixture(scope="module")
def searched(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> SearchResult:
    return search(workload, cluster, 4, Constraints(forbidden=(("offload", ""),)), profiles)


def test_nothing_is_better_than_the_front(
    workload: Workload, cluster: Cluster, searched: SearchResult, tried: list[Candidate]
) -> None:
    chosen = front(workload, cluster, searched)
    found = [(each.prediction.step_seconds, each.prediction.memory.total) for each in chosen]
    assert len(found) > 3
    assert found == sorted(found)
    assert [size for _, size in found] == sorted((size for _, size in found), reverse=True)
    for other in tried:
        # one that fits by less than that may not fit by the profiles that a search interpolates
        size = other.prediction.memory.total * (1 + WITHIN) / (1 - STEP)
        small = [each for each in chosen if each.prediction.memory.total <= size]
        seconds = other.prediction.step_seconds
        assert any(each.prediction.step_seconds <= seconds or are_equal(each, other) for each in small), other.strategy


def test_the_front_begins_with_the_plan_and_keeps_its_wishes(workload: Workload, profiles: ScaledProfiles) -> None:
    cluster = find_cluster("a100-40x4")
    found = search(workload, cluster, 4, Constraints.parse(fix=["tp=2"], forbid=["offload"]), profiles)
    points = front(workload, cluster, found)
    assert points[0] == found.plan.best
    assert {each.strategy.tp for each in points} == {2}


def test_a_plan_for_memory_has_the_same_front(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> None:
    both = [
        front(
            workload,
            cluster,
            search(workload, cluster, 4, Constraints.parse(objective, fix=["tp=2", "offload=0"]), profiles),
        )
        for objective in ("time", "memory")
    ]
    assert [str(each.strategy) for each in both[0]] == [str(each.strategy) for each in both[1]]


def test_dominated_strategies_are_not_on_it(searched: SearchResult) -> None:
    points = undominated(searched.plan.candidates)
    for each in points:
        for other in searched.plan.candidates:
            faster = other.prediction.step_seconds < each.prediction.step_seconds
            assert not (faster and other.prediction.memory.total <= each.prediction.memory.total)
    assert undominated([]) == []


def test_it_is_printed_and_in_the_document() -> None:
    document = api.plan(SPEC, cluster="a100-40x4", workers=4, fix=["tp=4"], pareto=True)
    rows: list[dict[str, Any]] = document["pareto"]
    assert rows[0]["strategy"] == document["best"]
    assert rows[0]["times_fastest"] == rows[0]["memory_share"] == 1
    assert all(row["times_fastest"] > 1 > row["memory_share"] for row in rows[1:])
    words = plan_summary(document)
    assert "What less memory costs" in words
    assert all(row["strategy"] in words for row in rows)


def test_others_are_looked_at_where_finalists_do_not_fit_as_they_were_traced(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster, searched: SearchResult
) -> None:
    """All that a first look finds is taken away, so that what it left out has to be looked at again."""
    first = {str(each.strategy) for each in searched.plan.candidates}
    right = Finalists.traced

    def traced(self: Any, strategy: Strategy) -> Candidate | None:
        return (
            None
            if str(self._in_few_words(Candidate(strategy, mock.Mock())).strategy) in first
            else right(self, strategy)
        )

    with mock.patch.object(Finalists, "traced", traced):
        found = search(workload, cluster, 4, Constraints(forbidden=(("offload", ""),)), profiles).plan
    assert found.best is not None
    assert not first & {str(each.strategy) for each in found.candidates[:5]}


def test_the_queue_gives_the_least_first() -> None:
    queue: Queue[str] = Queue()
    assert queue.least == math.inf
    for bound, what in ((2.0, "later"), (1.0, "first"), (2.0, "last")):
        queue.add(bound, what)
    assert queue.least == 1
    assert [queue.take()[1] for _ in range(2)] == ["first", "later"]
    assert list(queue) == [(2.0, "last")]


def test_the_limit_is_that_of_the_last_finalist_or_of_those_near_the_best() -> None:
    standing = BestSoFar(2, near=0.5)
    assert standing.limit == standing.limit_of("a") == math.inf
    standing.add(10, "a")
    assert standing.limit == 15
    standing.add(12, "b")
    standing.add(20, "c")
    assert standing.limit == 12
    assert standing.limit_of("c") == 20
    assert standing.limit_of("d") == math.inf
