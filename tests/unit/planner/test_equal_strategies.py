"""Strategies that predictions cannot tell apart."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.planner.constraints import Constraints
from shardwise.planner.document import plan_document
from shardwise.planner.plan import Candidate, Plan, are_equal
from shardwise.planner.search.problem import words
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.document import PARTS
from shardwise.predict.prediction import Memory, Prediction
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.strategy import Strategy


def prediction(compute: float, exposed: float, bubble: float, error: float | None = 0.2) -> Prediction:
    return Prediction(
        step_seconds=compute + exposed + bubble,
        compute_seconds=compute,
        communication_seconds=exposed,
        exposed_communication_seconds=exposed,
        bubble_seconds=bubble,
        optimizer_seconds=0.0,
        host_seconds=0.0,
        memory=Memory(parameters=1, gradients=0, optimizer=0, activations=0, temporary=0),
        memory_available=1000,
        model_flops=1.0,
        peak_flops=1.0,
        samples=4,
        error=error,
    )


def test_what_two_strategies_have_in_common_does_not_make_them_equal() -> None:
    """Ranges of 20% overlap, and yet the one that only waits longer is slower."""
    fast, slow = prediction(10.0, 1.0, 0.0), prediction(10.0, 1.5, 0.0)
    assert fast.high_seconds is not None
    assert slow.low_seconds is not None
    assert fast.high_seconds > slow.low_seconds
    assert not are_equal(slow, fast)
    assert not are_equal(prediction(8.0, 0.0, 0.0), prediction(4.0, 0.5, 0.0)), "one worker is no match for two"


def test_parts_that_make_up_for_each_other_make_strategies_equal() -> None:
    waits, bubbles = prediction(10.0, 1.0, 0.0), prediction(10.0, 0.0, 1.3)
    assert are_equal(waits, bubbles)
    assert are_equal(bubbles, waits)
    assert not are_equal(waits, prediction(10.0, 0.0, 1.6))
    exact = [replace(each, error=None) for each in (waits, bubbles)]
    assert not are_equal(*exact), "nothing is known of how wrong they may be"


def test_a_range_holds_the_step_and_is_as_wide_as_the_error() -> None:
    found = prediction(10.0, 0.0, 0.0, error=0.25)
    assert (found.low_seconds, found.high_seconds) == (8.0, 12.5)
    assert prediction(10.0, 0.0, 0.0, error=None).low_seconds is None


def test_the_parts_add_up_to_a_step(profiles: ScaledProfiles, cluster: Cluster) -> None:
    for text in ("single", "dp=4", "fsdp=2,tp=2", "pp=4,microbatches=4"):
        strategy = Strategy.parse(text)
        found = predict(profiles.of(strategy), strategy, cluster)
        assert sum(getattr(found, part) for part in PARTS) == pytest.approx(found.step_seconds, rel=1e-6)


def test_simpler_has_fewer_axes_and_options() -> None:
    ordered = ["dp=4", "dp=2,tp=2", "dp=2,tp=2,sp=1", "dp=2,tp=2,sp=1,recompute=1/2"]
    assert sorted(ordered, key=lambda text: words(Strategy.parse(text))) == ordered


def test_a_plan_says_which_strategies_are_equal() -> None:
    every = [prediction(10.0, 1.0, 0.0), prediction(10.0, 0.0, 1.3), prediction(10.0, 3.0, 0.0)]
    candidates = tuple(Candidate(Strategy(dp=n), each) for n, each in enumerate(every, 1))
    plan = Plan(
        workload="w",
        cluster="c",
        workers=4,
        constraints=Constraints(),
        candidates=candidates,
        rejected=(),
        smallest=None,
        seconds=1.0,
        looked_at=3,
        left_out=0,
    )
    document = plan_document(plan, ["words"])
    assert [row["equal_to_best"] for row in document["candidates"]] == [True, True, False]
    assert (document["program"], document["precision"]) == ("shardwise", "float32")
    front = document["candidates"][0]
    assert front["low_seconds"] < front["step_seconds"] < front["high_seconds"]
