"""Results kept from one strategy for the next, of equal stages, are those that each would have found alone."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from unittest import mock

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.errors import StrategyError
from shardwise.planner.constraints import Constraints
from shardwise.planner.search.space import divisors, families, members
from shardwise.predict.closed_form import stage_time
from shardwise.predict.closed_form.step_time import costs_of, predict
from shardwise.predict.profile.memo import Memo
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.workers.stage_keys import gathered_stage_key, stage_key
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt

BATCH = 16


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    return Profiles(gpt(8, 128, 4, 4, vocabulary=512, sequence=64, batch_size=BATCH))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return find_cluster("h100x16")


def some(profiles: Profiles, constraints: Constraints, count: int) -> Iterator[Strategy]:
    """Strategies of one profile's size, so that much of what is kept is met again."""
    segments = len(profiles.of(Strategy()).segments)
    every = [
        member.with_(recompute=again)
        for family in families(8, BATCH, constraints, divisors(4), segments)
        for member in members(family, constraints)
        for again in ("none", "full", "selective", "1/4", "3/4")
    ]
    yield from random.Random(0).sample(every, count)


def test_what_is_kept_changes_nothing(profiles: Profiles, cluster: Cluster) -> None:
    tried = 0
    for strategy in some(profiles, Constraints(fixed={"tp": "2"}), 160):
        try:
            warm = profiles.of(strategy)
            alone = predict(replace(warm, memo=Memo()), strategy, cluster)
        except StrategyError:
            continue
        tried += 1
        assert predict(warm, strategy, cluster) == alone
    assert tried > 100


def test_stages_of_a_deep_model_are_alike(profiles: Profiles, cluster: Cluster) -> None:
    strategy = Strategy.parse("fsdp=2,pp=8,recompute=full")
    profile = profiles.of(strategy)
    stages = costs_of(profile, strategy, cluster).parts.stages
    assert len({stage_key(profile, stage) for stage in stages.values()}) < len(stages)
    ends = stages[0], stages[7]
    assert stage_key(profile, ends[0]) != stage_key(profile, ends[1])


def test_what_is_computed_again_counts_but_not_for_what_is_gathered(profiles: Profiles, cluster: Cluster) -> None:
    both = [Strategy.parse(f"fsdp=2,pp=2,recompute={again}") for again in ("1/4", "2/4")]
    profile = profiles.of(both[0])
    first, second = (costs_of(profile, strategy, cluster).parts.stages[0] for strategy in both)
    assert stage_key(profile, first) != stage_key(profile, second)
    assert gathered_stage_key(profile, first) == gathered_stage_key(profile, second)


def test_stages_that_are_taken_for_alike_are_noticed(profiles: Profiles, cluster: Cluster) -> None:
    strategy = Strategy.parse("fsdp=2,pp=4,recompute=full")
    right = predict(replace(profiles.of(strategy), memo=Memo()), strategy, cluster)
    with mock.patch.object(stage_time, "stage_key", return_value=0):
        assert (
            predict(replace(profiles.of(strategy), memo=Memo()), strategy, cluster).step_seconds != right.step_seconds
        )


@pytest.mark.parametrize(
    "text",
    [
        "fsdp=2,pp=2",
        "dp=2,pp=4,schedule=interleaved",
        "fsdp=8",
        "tp=2,pp=2,schedule=zero-bubble",
        "fsdp=4,pp=2,zero=2,schedule=gpipe",
        "dp=8",
    ],
)
def test_more_blocks_computed_again_take_no_less_time(profiles: Profiles, cluster: Cluster, text: str) -> None:
    strategies = [Strategy.parse(f"{text},recompute={count}/8") for count in range(1, 8)]
    seconds = [costs_of(profiles.of(each), each, cluster).step_seconds for each in strategies]
    assert all(fewer <= more for fewer, more in pairwise(seconds)), seconds
    assert seconds[0] < seconds[-1]
