"""The simpler of equal strategies is found and chosen."""

from __future__ import annotations

from dataclasses import replace
from unittest import mock

import pytest
from predictions import prediction

from shardwise.cluster.cluster import Cluster
from shardwise.planner.constraints import Constraints
from shardwise.planner.equality import are_equal
from shardwise.planner.explain import explanation
from shardwise.planner.plan import Candidate
from shardwise.planner.search.finalists import Finalists
from shardwise.planner.search.problem import SearchProblem, words
from shardwise.planner.search.rejections import Rejections
from shardwise.planner.search.search import search
from shardwise.planner.search.simpler import simplifications
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.hardware.uncertainty import difference_error
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

FAST, SIMPLE = Strategy.parse("fsdp=2,tp=2"), Strategy.parse("fsdp=4")


def candidate(strategy: Strategy, compute: float, exposed: float, memory: int = 1) -> Candidate:
    return Candidate(strategy, prediction(compute, exposed, memory=memory))


@pytest.fixture
def problem(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> SearchProblem:
    return SearchProblem(workload, cluster, 4, Constraints(), profiles)


def chosen(problem: SearchProblem, *candidates: Candidate) -> Strategy:
    found = Finalists(problem, Rejections(problem.room))._simplest_first(list(candidates))
    assert sorted(map(id, found)) == sorted(map(id, candidates))
    return found[0].strategy


def test_the_choice_changes_exactly_at_the_bound(problem: SearchProblem) -> None:
    fast, bound = candidate(FAST, 10.0, 10.0), difference_error(FAST, SIMPLE)
    inside, outside = (candidate(SIMPLE, 20.0 * (1 + share * bound), 0.0) for share in (0.999, 1.001))
    assert chosen(problem, fast, inside) == SIMPLE
    assert chosen(problem, fast, outside) == FAST
    with mock.patch("shardwise.planner.equality.difference_error", return_value=0.0):
        assert chosen(problem, fast, inside) == FAST


def test_of_equally_simple_strategies_the_faster_one_is_chosen(problem: SearchProblem) -> None:
    slower = candidate(Strategy.parse("dp=4"), 20.3, 0.0)
    assert chosen(problem, slower, candidate(SIMPLE, 10.0, 10.0)) == SIMPLE


def test_a_simpler_strategy_is_compared_with_the_fastest_one(problem: SearchProblem) -> None:
    """Not with one that is between them, by which it would come ever slower."""
    bound = difference_error(FAST, SIMPLE)
    between = candidate(FAST.with_(sp=1), 20.0 * (1 + bound / 2), 0.0)
    slow = candidate(SIMPLE, 10.0 * (1 + 1.4 * bound), 10.0)
    assert are_equal(between, slow)
    assert chosen(problem, candidate(FAST, 10.0, 10.0), between, slow) == FAST


def test_for_memory_only_the_last_percent_gives_way(problem: SearchProblem) -> None:
    least = replace(problem, constraints=Constraints(objective="memory"))
    fast = candidate(FAST, 10.0, 10.0, memory=1000)
    assert chosen(least, fast, candidate(SIMPLE, 30.0, 0.0, memory=1009)) == SIMPLE
    assert chosen(least, fast, candidate(SIMPLE, 20.0, 0.0, memory=1011)) == FAST


def test_a_simpler_variant_has_one_option_or_one_axis_less() -> None:
    text = "fsdp=4,zero=2,tp=2,sp=1,pp=2,microbatches=8,schedule=interleaved,stages=3,recompute=1/2,outermost=pp"
    strategy = Strategy.parse(text)
    found = {str(each) for each in simplifications(strategy)}
    assert text.replace(",sp=1", "") in found
    assert text.replace(",recompute=1/2", ",recompute=full") in found
    assert text.replace(",schedule=interleaved,stages=3", "") in found
    assert "fsdp=4,zero=2,tp=4,sp=1,recompute=1/2" in found, "stages joined the tensor shards"
    assert "fsdp=8,zero=2,pp=2,microbatches=8,schedule=interleaved,stages=3,recompute=1/2,outermost=pp" in found
    for each in simplifications(strategy):
        assert words(each) < words(strategy)
        assert each.workers == strategy.workers
    assert not list(simplifications(Strategy.parse("dp=4")))


@pytest.mark.parametrize("fixed", [{}, {"tp": "2"}, {"microbatches": "2"}, {"pp": "2", "schedule": "gpipe"}])
def test_no_simpler_variant_of_a_plan_is_equal_to_the_fastest(
    fixed: dict[str, str], workload: Workload, profiles: ScaledProfiles, cluster: Cluster
) -> None:
    constraints = Constraints(fixed=fixed)
    found = search(workload, cluster, 4, constraints, profiles)
    best, fastest = found.plan.best, found.plan.fastest
    assert best is not None
    assert fastest is not None
    assert are_equal(best, fastest)
    assert constraints.refusal(best.strategy.for_batch(workload.batch_size)) is None
    for each in simplifications(best.strategy):
        settled = each.for_batch(workload.batch_size)
        if constraints.refusal(settled) is None:
            prediction = predict(profiles.of(settled), settled, cluster)
            assert not are_equal(Candidate(settled, prediction), fastest), settled
    said = any("the simpler is chosen" in line for line in explanation(found.plan, cluster, found.profile_of))
    assert said == (best is not fastest)
