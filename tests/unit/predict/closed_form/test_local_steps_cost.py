"""Predicted costs of local steps: averages count once in as many steps, and outer state takes memory."""

from __future__ import annotations

from functools import cache

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.timeline.timeline import Timeline, timeline
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt

PARAMETERS = 4  # bytes


@cache
def profiles() -> Profiles:
    return Profiles(gpt(2, 1024, 8, 4, vocabulary=4096, sequence=128, batch_size=16), "gpu")


@cache
def cluster() -> Cluster:
    return find_cluster("g5x16")


@cache
def predicted(text: str) -> Prediction:
    strategy = Strategy.parse(text)
    return costs_of(profiles().of(strategy), strategy, cluster()).prediction()


def played(text: str) -> Timeline:
    strategy = Strategy.parse(text)
    return timeline(profiles().of(strategy), strategy, cluster())


def average_seconds(text: str) -> float:
    strategy = Strategy.parse(text)
    costs = costs_of(profiles().of(strategy), strategy, cluster())
    return sum(costs.finish(costs.parts.workers[0]).averages)


def test_averages_cost_a_part_of_what_gradients_cost() -> None:
    every, few, none = (predicted(f"dp=16{rest}").step_seconds for rest in ("", ",local=10", ",local=100000"))
    assert none < few < every
    assert few - none == pytest.approx((predicted("dp=16,local=5").step_seconds - none) / 2, rel=0.01)
    assert (few - none) * 10 >= average_seconds("dp=16,local=10")


def test_a_step_without_an_average_exposes_no_gradient() -> None:
    lone, local = predicted("single,microbatches=1"), predicted("dp=16,local=100000")
    assert local.exposed_communication_seconds < 0.02 * predicted("dp=16").exposed_communication_seconds
    assert local.compute_seconds < lone.compute_seconds


def test_an_average_hides_behind_the_steps_of_its_delay() -> None:
    at_once, later = predicted("dp=16,local=8"), predicted("dp=16,local=8,delay=7")
    assert later.exposed_communication_seconds < at_once.exposed_communication_seconds
    seconds, step = average_seconds("dp=16,local=8"), predicted("dp=16,local=100000").step_seconds
    hidden = min(seconds, 7 * step) / 8
    gained = at_once.exposed_communication_seconds - later.exposed_communication_seconds
    assert 0.3 * hidden <= gained <= hidden * 1.01


def test_messages_of_fragments_add_up_to_the_parameters() -> None:
    strategy = Strategy.parse("dp=16,local=8,fragments=4")
    costs = costs_of(profiles().of(strategy), strategy, cluster())
    sizes = [sum(each.bytes for each in one) for one in costs.stages.program.averages(costs.parts.workers[0])]
    assert sum(sizes) == costs.parts.workers[0].trained
    assert len(sizes) == 4
    assert max(sizes) < sum(sizes) / 2


@pytest.mark.parametrize(("option", "copies"), [("", 0), (",outer=nesterov", 2)])
def test_the_outer_optimizer_takes_two_copies(option: str, copies: int) -> None:
    strategy = Strategy.parse("dp=16,local=8")
    trained = costs_of(profiles().of(strategy), strategy, cluster()).parts.workers[0].trained
    more = predicted(f"dp=16,local=8{option}").memory.optimizer - predicted("dp=16").memory.optimizer
    assert more == copies * trained


def test_the_simulated_step_ends_with_an_average_and_its_prediction_is_the_mean() -> None:
    found, usual = played("dp=16,local=8"), played("dp=16,local=100000")
    rows = [row for row in found.document() if row["kind"] == "averages"]
    assert len(rows) == 1
    assert not any("sum bucket" in row["name"] for row in found.document())
    longest = max(row["start_seconds"] + row["seconds"] for row in found.document())
    assert usual.prediction.step_seconds < found.prediction.step_seconds < longest


def test_a_slow_replica_slows_all_of_them() -> None:
    """Averages, and the losses of each step, are waited for: local steps hide slow links, not slow workers."""
    strategy = Strategy.parse("dp=4,local=50").for_batch(16)
    profile = profiles().of(strategy)
    usual, slow = (timeline(profile, strategy, cluster(), slowed=each).prediction for each in ({}, {1: 3.0}))
    assert slow.step_seconds == pytest.approx(3 * usual.step_seconds, rel=0.1)
