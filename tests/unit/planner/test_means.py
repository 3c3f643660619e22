"""Means that change training: offered always, chosen only where they are allowed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.errors import RequestError
from shardwise.planner.constraints import Constraints
from shardwise.planner.document import plan_document
from shardwise.planner.explain import explanation, with_bandwidth
from shardwise.planner.means import MEANS, order
from shardwise.planner.plan import Plan
from shardwise.planner.search.search import search
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.strategy import CHANGES, Strategy
from shardwise.workload.workload import Workload


def slow(cluster: Cluster) -> Cluster:
    """Return the cluster with links a thousandth as fast."""
    for level in cluster.levels:
        cluster = with_bandwidth(cluster, level.name, 1e-3)
    return cluster


def planned(workload: Workload, cluster: Cluster, profiles: ScaledProfiles, *allow: str) -> Plan:
    constraints = Constraints.parse(fix=["tp=1,pp=1"], allow=allow)
    return search(workload, cluster, 4, constraints, profiles).plan


def test_each_means_is_a_strategy_that_says_what_it_changes() -> None:
    strategies = [Strategy.parse(f"{'pp=4' if 'schedule' in means else 'dp=4'},{means}") for means in MEANS]
    assert [order(strategy) for strategy in strategies] == list(range(1, len(MEANS) + 1))
    for strategy in strategies:
        assert strategy.changes
        assert set(strategy.changes) <= set(CHANGES)
    assert order(Strategy.parse("dp=4")) == 0
    assert order(Strategy.parse("dp=4,compress=topk:0.5")) > len(MEANS), "one that plan does not try"


def test_means_are_offered_and_not_chosen(workload: Workload, cluster: Cluster, profiles: ScaledProfiles) -> None:
    links = slow(cluster)
    plan = planned(workload, links, profiles)
    assert plan.best is not None
    assert plan.best.strategy.changes == ()
    assert {offer.means for offer in plan.offers} == set(MEANS) - {"schedule=pipedream"}, "pp=1"
    words = "\n".join(explanation(plan, links, profiles.of))
    assert "--allow lossy" in words
    rows = plan_document(plan, [])["means"]
    assert [row["means"] for row in rows] == [offer.means for offer in plan.offers]
    assert not any(row["allowed"] for row in rows)
    assert min(row["times_best"] for row in rows) < 0.5


def test_a_pipeline_without_an_end_is_offered_and_has_no_bubble(
    workload: Workload, cluster: Cluster, profiles: ScaledProfiles
) -> None:
    constraints = Constraints.parse(fix=["pp=2,tp=2"], allow=["async"])
    plan = search(workload, cluster, 4, constraints, profiles).plan
    found = next(offer for offer in plan.offers if offer.means == "schedule=pipedream").candidate
    assert found.strategy.changes == ("async",)
    assert found.prediction.bubble_seconds < 0.05 * found.prediction.step_seconds
    assert any("one step old" in note for note in found.prediction.notes)


def test_what_is_allowed_is_chosen_where_it_is_faster(
    workload: Workload, cluster: Cluster, profiles: ScaledProfiles
) -> None:
    links = slow(cluster)
    exact, lossy = planned(workload, links, profiles), planned(workload, links, profiles, "lossy")
    assert exact.best is not None
    assert lossy.best is not None
    assert lossy.best.strategy.changes == ("lossy",)
    assert lossy.best.prediction.step_seconds < 0.5 * exact.best.prediction.step_seconds
    assert "It changes training (lossy)" in "\n".join(explanation(lossy, links, profiles.of))
    other = planned(workload, links, profiles, "async").best
    assert other is not None
    assert "lossy" not in other.strategy.changes


def test_of_equal_strategies_the_one_that_changes_nothing_is_chosen(
    workload: Workload, cluster: Cluster, profiles: ScaledProfiles
) -> None:
    levels = tuple(replace(level, bandwidth=1e15, latency=0.0) for level in cluster.levels)
    best = planned(workload, replace(cluster, levels=levels), profiles, *CHANGES).best
    assert best is not None
    assert best.strategy.changes == ()


def test_unknown_change() -> None:
    with pytest.raises(RequestError, match=r"--allow losy: known are lossy, async; did you mean 'lossy'\?"):
        Constraints.parse(allow=["losy"])
