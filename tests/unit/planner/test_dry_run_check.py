"""Finalists are run dry, and dropped where they do not fit as the real program has them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest

from shardwise.cluster.find import find_cluster
from shardwise.planner import dry_run_check as judging
from shardwise.planner.constraints import Constraints
from shardwise.planner.dry_run_check import judge
from shardwise.planner.plan import Plan
from shardwise.planner.search.search import SearchResult, search
from shardwise.predict.crosscheck import Crosscheck
from shardwise.workload.recipes.gpt import gpt

CLUSTER = find_cluster("h100x4")
ROOM = 80 * 2**30


@pytest.fixture(scope="module")
def searched() -> SearchResult:
    return search(gpt(2, 128, 4, 2, vocabulary=256, sequence=64, batch_size=8), CLUSTER, 4, Constraints())


@pytest.fixture(scope="module")
def fair(searched: SearchResult) -> Plan:
    return judge(searched.plan, searched.profiles, CLUSTER, ROOM, 2)


def test_finalists_have_the_memory_of_their_dry_runs(searched: SearchResult, fair: Plan) -> None:
    assert [each.strategy for each in fair.candidates] == [each.strategy for each in searched.plan.candidates]
    for candidate in fair.candidates[:2]:
        assert candidate.dry_run is not None
        assert candidate.prediction.memory.tensors == candidate.dry_run.run.memory.total
        assert candidate.dry_run.document()["bytes_agree"]
    assert all(candidate.dry_run is None for candidate in fair.candidates[2:])


def test_what_does_not_fit_as_it_runs_is_rejected(searched: SearchResult, fair: Plan) -> None:
    sizes = [candidate.prediction.memory.total for candidate in fair.candidates[:2]]
    room = max(sizes) - 1
    found = judge(searched.plan, searched.profiles, CLUSTER, room, 2)
    dropped = fair.candidates[sizes.index(max(sizes))].strategy
    assert dropped not in [candidate.strategy for candidate in found.candidates]
    entry = next(each for each in found.rejected if each.strategy == dropped)
    assert entry.kind == "memory"
    assert "its dry run needs" in entry.reason


def test_more_are_run_until_one_fits(searched: SearchResult) -> None:
    ran: list[str] = []

    def too_large_at_first(profiles: Any, strategy: Any, cluster: Any) -> Crosscheck:
        ran.append(str(strategy))
        found = mock.Mock()
        memory = searched.plan.candidates[0].prediction.memory
        found.run.memory = replace(memory, activations=2 * ROOM if len(ran) < 4 else 1)
        judged: Crosscheck = found
        return judged

    with mock.patch.object(judging, "crosscheck", too_large_at_first):
        found = judge(searched.plan, searched.profiles, CLUSTER, ROOM, 2)
    assert len(ran) == 4
    assert str(found.candidates[0].strategy) == ran[3]


def test_nothing_fits_as_it_runs(searched: SearchResult) -> None:
    few = replace(searched.plan, candidates=searched.plan.candidates[:2])
    found = judge(few, searched.profiles, CLUSTER, 1, 1)
    assert found.best is None
    assert found.smallest is not None
    assert len(found.rejected) == len(searched.plan.rejected) + 2
