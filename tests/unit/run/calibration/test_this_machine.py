"""The benchmark of predictions for this machine tells the median, the worst row, and the share within their ranges."""

from __future__ import annotations

import pytest

from benchmarks.this_machine import Run, row, summary
from shardwise.strategy import Strategy
from shardwise.workload.source import Source


def run(strategy: str, predicted: float, measured: list[float]) -> Run:
    memory = 2.0**28
    found = Run("image", Source(workload="image"), Strategy.parse(strategy), (predicted, memory), 0.2)
    found.measured = [(seconds, memory / 1.25) for seconds in measured]
    return found


def test_rows_are_of_medians_over_slices() -> None:
    found = row(run("dp=2", 0.11, [0.1, 0.5, 0.1]))
    assert found["measured ms"] == pytest.approx(100)
    assert found["error"] == pytest.approx(0.1)
    assert found["memory error"] == pytest.approx(0.25)
    assert found["within"]


def test_a_slower_machine_is_told_apart_from_a_wrong_prediction() -> None:
    slowed = run("dp=2", 0.1, [0.15])
    slowed.pace = 1.5
    assert row(slowed)["error at pace"] == pytest.approx(0.0)
    assert summary([row(slowed)])["worst row of time at pace"] == "image dp=2 +0.0%"
    assert row(run("dp=2", 0.1, [0.15]))["error at pace"] is None


def test_the_summary_tells_the_worst_row() -> None:
    rows = [row(run(f"dp={count}", 0.1 * (1 + error), [0.1])) for count, error in ((1, 0.1), (2, -0.5), (3, 0.2))]
    found = summary(rows)
    assert found["median error of time"] == pytest.approx(0.2)
    assert found["error of time in nine of ten rows"] == pytest.approx(0.5)
    assert found["worst row of time"] == "image dp=2 -50.0%"
    assert found["share of rows within their range"] == pytest.approx(0.667)
