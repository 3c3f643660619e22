"""A slow rank, a slow step and a rotating straggler are told apart."""

from __future__ import annotations

import pytest

from benchmarks.made_run import MadeRun
from shardwise.reports.page.entry import Entry
from shardwise.reports.page.panels.ranks import Busy, busy_of, pattern


def words(run: MadeRun) -> str:
    busy = busy_of(Entry({"ranks": run.ranks()}))
    assert busy is not None
    return pattern(busy)


def test_even_ranks() -> None:
    assert words(MadeRun()) == "All ranks work about equally long in all steps."


def test_a_slow_rank() -> None:
    assert words(MadeRun(slow=2)).startswith("Rank 2 is slow in most steps: it works 1.5 times as long as the others")


def test_a_slow_step() -> None:
    assert words(MadeRun(slow_step=7)) == "In step 7 all ranks were slow, 1.7 times the usual."


def test_a_rotating_straggler() -> None:
    said = words(MadeRun(rotating=True))
    assert "The straggler changes: in 40 of 40 steps a single rank was late" in said
    assert "is slow in most steps" not in said


@pytest.mark.parametrize("count", [1, 3])
def test_few_steps_are_no_pattern(count: int) -> None:
    assert "too few to tell" in pattern(Busy(tuple(range(count)), ((1.0, 2.0),) * count))


def test_lines_of_another_run_and_of_profiled_steps_are_left_out() -> None:
    lines = [
        {"step": 1, "busy_seconds": [1.0]},
        {"step": 2, "busy_seconds": [1.0, 1.0]},
        {"step": 3, "busy_seconds": [9.0, 9.0], "profiled": True},
        {"step": 4, "busy_seconds": [None, 1.0]},
    ]
    busy = busy_of(Entry({"ranks": lines}))
    assert busy is not None
    assert busy.steps == (2,)
    assert busy_of(Entry({"ranks": []})) is None
