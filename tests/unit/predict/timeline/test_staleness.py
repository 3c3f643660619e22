"""Paces of workers that may be ahead of each other."""

from __future__ import annotations

import random

import pytest

from shardwise.predict.timeline.staleness import paces


def constant(*seconds: float):  # type: ignore[no-untyped-def]
    return lambda worker, step: seconds[worker]


def test_without_staleness_everyone_waits_for_the_slowest() -> None:
    found = paces(constant(1.0, 1.0, 2.0), 3, 0)
    assert found.step_seconds == pytest.approx(2.0)
    assert found.waited == pytest.approx((0.5, 0.5, 0.0), abs=0.01)


@pytest.mark.parametrize("staleness", [1, 4])
def test_a_bound_does_not_make_a_slow_worker_faster(staleness: int) -> None:
    found = paces(constant(1.0, 1.0, 2.0), 3, staleness)
    assert found.step_seconds == pytest.approx(2.0, rel=0.03)
    assert found.waited[0] == pytest.approx(0.5, abs=0.03)
    assert found.waited[2] == 0


def test_without_a_bound_each_goes_at_its_own_pace() -> None:
    found = paces(constant(1.0, 1.0, 2.0), 3, None)
    assert found.step_seconds == pytest.approx(3 / (1 + 1 + 0.5), rel=0.02)
    assert found.waited == (0.0, 0.0, 0.0)


def test_a_bound_hides_that_steps_differ_in_length() -> None:
    def drawn(worker: int, step: int) -> float:
        return 1.0 + random.Random(1000 * step + worker).random()

    found = [paces(drawn, 4, staleness).step_seconds for staleness in (0, 1, 3, None)]
    assert found == sorted(found, reverse=True)
    assert found[0] == pytest.approx(1 + 4 / 5, rel=0.03)  # the mean of the largest of four
    assert found[-1] < 1.53
    assert found[2] < 0.5 * (found[0] + found[-1])
