"""Small programs whose times are known by hand."""

from __future__ import annotations

import pytest

from shardwise.predict.timeline.events import COMPUTE, Deadlock, Operation, Simulation


def computing(worker: int, seconds: float, launch: float = 0.0) -> Operation:
    return Operation(worker, COMPUTE, "work", "forward", seconds, launch=launch)


def sending(worker: int, seconds: float, stream: str = "dp", crowds: bool = False) -> Operation:
    return Operation(worker, stream, "sum", "gradients", seconds, crowds=crowds)


def test_streams_go_on_beside_each_other() -> None:
    simulation = Simulation([1.0])
    first = simulation.issue(computing(0, 2.0))
    sent = simulation.issue(sending(0, 5.0), [first])
    second = simulation.issue(computing(0, 3.0))
    last = simulation.issue(computing(0, 1.0), [sent])
    assert simulation.run() == 8.0
    assert [(o.start, o.end) for o in (first, sent, second, last)] == [(0, 2), (2, 7), (2, 5), (7, 8)]
    assert last.idle == 5.0
    assert last.cause is sent
    assert second.idle < 0


def test_a_stream_keeps_its_order() -> None:
    simulation = Simulation([1.0])
    slow = simulation.issue(computing(0, 4.0))
    behind = simulation.issue(sending(0, 1.0), [slow])
    ready = simulation.issue(sending(0, 1.0))  # nothing to wait for but the one before it
    simulation.run()
    assert (behind.start, ready.start) == (4.0, 5.0)


def test_collectives_begin_when_the_last_is_ready() -> None:
    simulation = Simulation([1.0, 1.0])
    sums = []
    for worker, seconds in enumerate((1.0, 3.0)):
        done = simulation.issue(computing(worker, seconds))
        sums.append(simulation.issue(sending(worker, 2.0), [done], together="sum"))
    assert simulation.run() == 5.0
    assert {(each.start, each.end) for each in sums} == {(3.0, 5.0)}


def test_a_host_that_is_slower_than_its_device() -> None:
    simulation = Simulation([1.0])
    small = [simulation.issue(computing(0, 1.0, launch=2.0)) for _ in range(3)]
    assert simulation.run() == 6.0
    assert [(o.start, o.ready, o.end) for o in small] == [(0, 1, 2), (2, 3, 4), (4, 5, 6)]


def test_a_host_that_runs_ahead() -> None:
    simulation = Simulation([1.0])
    large = simulation.issue(computing(0, 10.0, launch=1.0))
    small = simulation.issue(computing(0, 1.0, launch=4.0))  # started while the large one computes
    assert simulation.run() == 11.0
    assert (large.end, small.start, small.end) == (10.0, 10.0, 11.0)


def test_a_host_that_waits() -> None:
    simulation = Simulation([1.0])
    first = simulation.issue(computing(0, 2.0))
    sent = simulation.issue(sending(0, 3.0), [first])
    simulation.wait(0, sent)
    second = simulation.issue(computing(0, 1.0))
    assert simulation.run() == 6.0
    assert second.start == 5.0
    assert second.cause is sent


def test_communication_slows_computing_down() -> None:
    """Half as fast for the 4 s of the sum: 2 s of work are done then, and 4 s of 6 s are left."""
    simulation = Simulation([2.0])
    simulation.issue(sending(0, 4.0, crowds=True))
    work = simulation.issue(computing(0, 6.0))
    after = simulation.issue(computing(0, 1.0))
    simulation.run()
    assert (work.start, work.end) == (0.0, 8.0)
    assert after.end == 9.0


def test_a_sum_that_begins_while_it_computes() -> None:
    simulation = Simulation([2.0])
    first = simulation.issue(computing(0, 1.0))
    work = simulation.issue(computing(0, 5.0))
    simulation.issue(sending(0, 2.0, crowds=True), [first])
    simulation.run()
    assert work.end == 1.0 + 2.0 + 4.0  # 1 s of work in the 2 s of the sum, 4 s alone


@pytest.mark.parametrize("together", [None, "sum"])
def test_who_waits_for_what_never_comes(together: str | None) -> None:
    simulation = Simulation([1.0, 1.0])
    first, second = sending(0, 1.0), sending(1, 1.0)
    simulation.issue(first, [second], together)
    simulation.issue(second, [first], together)
    with pytest.raises(Deadlock, match="waits for what never comes"):
        simulation.run()


def test_a_host_that_waits_for_what_it_issues_later() -> None:
    simulation = Simulation([1.0])
    never = computing(0, 1.0)
    simulation.wait(0, never)
    simulation.issue(never)
    with pytest.raises(Deadlock):
        simulation.run()
