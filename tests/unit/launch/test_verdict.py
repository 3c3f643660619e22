from __future__ import annotations

import pytest

from shardwise.launch.verdict import Limits, Pace, State, hang, slow, slow_message

LIMITS = Limits(idle=60, busy=600)
HERE = {0: "a", 1: "a", 2: "a"}


def waits(operation: str = "all_reduce", steps: int = 4, stalled: float = 61) -> State:
    return State(stalled, steps, waiting=True, busy=False, operation=operation, stack="waits\n")


def is_in(operation: str, *, busy: bool = False, stalled: float = 61) -> State:
    return State(stalled, 4, waiting=False, busy=busy, operation=operation, stack="stands\n")


def test_the_one_that_does_not_wait_holds_the_others_up() -> None:
    found = hang({0: waits(), 1: is_in("loss (work.py:31)"), 2: waits()}, LIMITS, HERE)
    assert found is not None
    assert (found.rank, found.stack) == (1, "stands\n")
    assert found.message == "worker 1 has been in loss (work.py:31) for 61 s; workers 0, 2 waits in all_reduce"


def test_who_still_computes_is_given_time() -> None:
    states = {0: waits(), 1: is_in("forward (model.py:1)", busy=True), 2: waits()}
    assert hang(states, LIMITS, HERE) is None
    endless = states | {1: is_in("forward (model.py:1)", busy=True, stalled=601)}
    found = hang(endless, LIMITS, HERE)
    assert found is not None
    assert found.rank == 1


def test_one_that_sleeps_is_blamed_before_one_that_computes() -> None:
    states = {0: is_in("loader", busy=True, stalled=700), 1: is_in("read (data.py:2)"), 2: waits()}
    found = hang(states, LIMITS, HERE)
    assert found is not None
    assert found.rank == 1


def test_one_that_does_not_answer_is_named_with_its_host() -> None:
    found = hang({0: waits(), 1: None, 2: waits()}, LIMITS, {0: "a", 1: "b", 2: "a"})
    assert found is not None
    assert found.rank == 1
    assert found.message.startswith("worker 1 on b does not answer")


def test_many_that_do_not_answer_are_counted() -> None:
    states: dict[int, State | None] = dict.fromkeys(range(1, 9)) | {0: waits()}
    found = hang(states, LIMITS, {})
    assert found is not None
    assert "and 4 more do not answer" in found.message


def test_all_that_wait_for_each_other_are_shown() -> None:
    found = hang({0: waits("all_reduce"), 1: waits("broadcast", steps=3)}, LIMITS, HERE)
    assert found is not None
    assert found.rank == 1  # it has done fewer steps
    assert "worker 0 waits in all_reduce; worker 1 waits in broadcast" in found.message
    assert found.stack.count("waits\n") == 2


@pytest.mark.parametrize(
    ("waiting", "expected"),
    [
        pytest.param([0.8, 0.05], 1, id="one of two"),
        pytest.param([0.6, 0.7, 0.1, 0.5], 2, id="one of four"),
        pytest.param([0.5, 0.5], None, id="both wait: slow links"),
        pytest.param([0.3, 0.1], None, id="a little slower"),
        pytest.param([0.05, 0.05, 0.05, 0.8], None, id="one that is too fast"),
        pytest.param([0.1], None, id="alone"),
    ],
)
def test_who_is_slow(waiting: list[float], expected: int | None) -> None:
    assert slow({rank: Pace(share, "") for rank, share in enumerate(waiting)}) == expected


def test_a_slow_worker_is_told_with_what_it_costs() -> None:
    paces = {0: Pace(0.62, "all_reduce"), 1: Pace(0.02, "loss (work.py:33)")}
    assert slow_message(1, paces) == (
        "worker 1 is slow, mostly in loss (work.py:33): the others spend 62% of their time waiting for it"
    )
