"""Times of pipelines that do not wait for the end of a step, against what can be said by hand."""

from __future__ import annotations

import pytest

from shardwise.predict.closed_form.pipeline import Messages, TimedPass
from shardwise.predict.closed_form.streamed import stream_seconds
from shardwise.splitting.schedule import order

FORWARD, BACKWARD = 1.0, 2.0


def tables(workers: int, microbatches: int, slower: int = -1, factor: float = 1.0) -> list[list[TimedPass]]:
    """Return the passes of each worker; those of `slower` take longer."""
    seconds = {"F": FORWARD, "B": BACKWARD}
    return [
        [
            TimedPass(a, seconds[a.kind] * (factor if w == slower else 1.0))
            for a in order("1f1b", w, workers, 1, microbatches)
        ]
        for w in range(workers)
    ]


def chained(workers: int, seconds: float) -> Messages:
    forward = {("F", stage): [(stage - 1, seconds)] for stage in range(1, workers)}
    return forward | {("B", stage - 1): [(stage, seconds)] for stage in range(1, workers)}


@pytest.mark.parametrize("workers", [2, 4, 8])
@pytest.mark.parametrize("microbatches", [8, 13, 64])
@pytest.mark.parametrize("update", [0.0, 5.0])
def test_there_is_no_bubble(workers: int, microbatches: int, update: float) -> None:
    found = stream_seconds(tables(workers, microbatches), [update] * workers, chained(workers, 0.0))
    assert found == pytest.approx(microbatches * (FORWARD + BACKWARD) + update)


@pytest.mark.parametrize("slower", [0, 1, 3])
def test_the_slowest_worker_sets_the_pace(slower: int) -> None:
    found = stream_seconds(tables(4, 8, slower, 1.5), [0.0] * 4, chained(4, 0.0))
    assert found == pytest.approx(8 * 1.5 * (FORWARD + BACKWARD))


@pytest.mark.parametrize("seconds", [0.5, 4.0])
def test_slow_messages_are_waited_for_by_round_trips(seconds: float) -> None:
    workers, microbatches = 4, 16
    trips = [left * (FORWARD + BACKWARD) + 2 * (left - 1) * seconds for left in range(1, workers + 1)]
    pace = max(trip / left for left, trip in enumerate(trips, 1))
    found = stream_seconds(tables(workers, microbatches), [0.0] * workers, chained(workers, seconds))
    assert found == pytest.approx(microbatches * pace, rel=0.02)


def test_many_microbatches_take_linearly_longer() -> None:
    short, long = (stream_seconds(tables(2, n), [1.0, 3.0], chained(2, 0.7)) for n in (100, 200))
    assert long - short == pytest.approx(100 * (FORWARD + BACKWARD + 0.7), rel=0.02)
