"""The parts of a step add up to the step."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.reports.page.intervals import length, mean_parts, rank_parts, union, without


def row(rank: int, stream: str, kind: str, start: float, seconds: float) -> dict[str, Any]:
    return {"rank": rank, "stream": stream, "kind": kind, "start_seconds": start, "seconds": seconds}


def test_exposed_communication_is_what_no_computation_covers() -> None:
    rows = [
        row(0, "compute", "forward", 0.0, 4.0),
        row(0, "dp", "gradients", 3.0, 3.0),
        row(0, "pp to 1", "message", 5.0, 2.0),
        row(0, "compute", "optimizer", 8.0, 1.0),
    ]
    parts = rank_parts(rows, (0.0, 10.0))
    assert parts == pytest.approx({"compute": 4.0, "optimizer": 1.0, "dp": 2.0, "pp": 1.0, "waiting": 2.0})
    assert sum(parts.values()) == pytest.approx(10.0)


def test_recorded_waits_are_no_computation_and_the_rest_is_the_hosts() -> None:
    rows = [row(0, "compute", "backward", 0.0, 6.0), row(0, "waiting", "waiting", 4.0, 2.0)]
    assert rank_parts(rows, (0.0, 7.0)) == pytest.approx({"compute": 4.0, "waiting": 2.0, "host": 1.0})


def test_parts_are_means_over_the_ranks() -> None:
    rows = [row(0, "compute", "forward", 0.0, 2.0), row(1, "compute", "forward", 0.0, 4.0)]
    assert mean_parts(rows) == pytest.approx({"compute": 3.0, "waiting": 1.0})
    assert mean_parts([]) == {}


def test_union_and_difference() -> None:
    assert union([(3.0, 4.0), (0.0, 2.0), (1.0, 2.5)]) == [(0.0, 2.5), (3.0, 4.0)]
    assert without([(0.0, 10.0), (12.0, 13.0)], [(1.0, 2.0), (9.0, 12.5)]) == [(0.0, 1.0), (2.0, 9.0), (12.5, 13.0)]
    assert length(union([])) == 0
