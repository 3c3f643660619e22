"""Strategies that predictions cannot tell apart."""

from __future__ import annotations

import pytest
from predictions import prediction

from shardwise.cluster.cluster import Cluster
from shardwise.planner.constraints import Constraints
from shardwise.planner.document import plan_document
from shardwise.planner.equality import WITHIN, are_equal
from shardwise.planner.plan import Candidate, Plan
from shardwise.planner.search.problem import words
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.document import PARTS
from shardwise.predict.hardware.uncertainty import difference_error, kind_of_difference
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.strategy import Strategy


def candidate(text: str, compute: float, exposed: float, bubble: float, error: float | None = 0.2) -> Candidate:
    return Candidate(Strategy.parse(text), prediction(compute, exposed, bubble, error=error))


def test_what_two_strategies_have_in_common_does_not_make_them_equal() -> None:
    """Ranges of 20% overlap, and yet the one that only waits longer is slower."""
    fast, slow = candidate("dp=4", 10.0, 1.0, 0.0), candidate("dp=4,bucket=1", 10.0, 1.15, 0.0)
    assert fast.prediction.high_seconds is not None
    assert slow.prediction.low_seconds is not None
    assert fast.prediction.high_seconds > slow.prediction.low_seconds
    assert not are_equal(slow, fast)


def test_parts_that_make_up_for_each_other_make_strategies_equal() -> None:
    waits, bubbles = candidate("fsdp=4", 10.0, 1.0, 0.0), candidate("pp=4", 10.0, 0.0, 1.3)
    assert are_equal(waits, bubbles)
    assert are_equal(bubbles, waits)
    assert not are_equal(waits, candidate("pp=4", 10.0, 0.0, 1.6)), "a fifth of 2.6 s is less than 0.6 s"


def test_strategies_are_equal_exactly_up_to_the_error_of_their_difference() -> None:
    """Their parts differ in everything, so that the error of the difference is the bound."""
    waits = candidate("fsdp=4", 10.0, 10.0, 0.0)
    kinds = {"data": "dp=4", "tensor": "dp=2,tp=2", "pipeline": "tp=2,pp=2"}
    for kind, text in kinds.items():
        other = Strategy.parse(text)
        assert kind_of_difference(waits.strategy, other) == kind
        bound = difference_error(waits.strategy, other)
        assert WITHIN < bound < 0.1
        inside, outside = (candidate(text, 20.0 * (1 + share * bound), 0.0, 0.0) for share in (0.999, 1.001))
        assert are_equal(waits, inside)
        assert are_equal(inside, waits)
        assert not are_equal(waits, outside)


def test_the_axis_that_is_hardest_to_predict_gives_the_bound() -> None:
    errors = [difference_error(Strategy(), Strategy.parse(text)) for text in ("dp=2", "tp=2", "pp=2", "tp=2,pp=2")]
    assert errors[2] == errors[3]
    assert len(set(errors)) == 3
    same_axes = difference_error(Strategy.parse("tp=2,pp=2"), Strategy.parse("tp=2,pp=2,recompute=full"))
    assert same_axes == errors[0]


def test_where_no_error_is_known_only_what_nobody_notices_is_equal() -> None:
    waits = candidate("fsdp=4", 10.0, 10.0, 0.0, error=None)
    assert are_equal(waits, candidate("pp=4", 20.19, 0.0, 0.0, error=None))
    assert not are_equal(waits, candidate("pp=4", 20.21, 0.0, 0.0, error=None))


def test_strategies_within_one_percent_are_equal_whatever_differs() -> None:
    fast = candidate("dp=4", 10.0, 1.0, 0.0)
    assert are_equal(fast, candidate("dp=4,bucket=1", 10.0, 1.109, 0.0))
    assert not are_equal(fast, candidate("dp=4,bucket=1", 10.0, 1.111, 0.0))


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
    candidates = (
        candidate("fsdp=4", 10.0, 1.0, 0.0),
        candidate("pp=4", 10.0, 0.0, 1.3),
        candidate("dp=2,pp=2", 10.5, 0.0, 0.3),
        candidate("dp=4", 10.0, 3.0, 0.0),
    )
    plan = Plan(
        workload="w",
        cluster="c",
        workers=4,
        constraints=Constraints(),
        candidates=candidates,
        rejected=(),
        smallest=None,
        seconds=1.0,
        looked_at=4,
        left_out=0,
    )
    document = plan_document(plan, ["words"])
    assert [row["equal_to_best"] for row in document["candidates"]] == [True, True, True, False]
    assert document["fastest"] == "dp=2,pp=2"
    assert document["slower_than_fastest"] == pytest.approx(11.0 / 10.8 - 1)
    assert (document["program"], document["precision"]) == ("shardwise", "float32")
    front = document["candidates"][0]
    assert front["low_seconds"] < front["step_seconds"] < front["high_seconds"]
