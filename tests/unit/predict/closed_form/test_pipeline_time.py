"""Times of pipelines agree: formulas of their papers, tables played by hand, and both against each other."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from shardwise.collective import Collective, Group
from shardwise.predict.closed_form.overlap import Passed, TimedPiece, overlapped
from shardwise.predict.closed_form.pipeline import Messages, StageTime, TimedPass, pipeline_seconds, played
from shardwise.predict.closed_form.segment_times import PassSeconds
from shardwise.predict.workers.step_program import Communication, Piece
from shardwise.splitting.schedule import BACKWARD, Action, order


def tables(
    schedule: str, workers: int, microbatches: int, stages: Sequence[StageTime], **others: float
) -> list[list[TimedPass]]:
    """Each worker's table with the seconds of its stages; `others`: of every pass."""
    return [
        [TimedPass(action, seconds(action, stages[action.stage]), **others) for action in each]
        for each in (
            order(schedule, worker, workers, len(stages) // workers, microbatches) for worker in range(workers)
        )
    ]


def seconds(action: Action, stage: StageTime) -> float:
    return {"F": stage.forward, "I": stage.backward, "W": stage.weights}.get(
        action.kind, stage.backward + stage.weights
    )


def chained(count: int, workers: int, seconds: float) -> Messages:
    found: dict[tuple[str, int], list[tuple[int, float]]] = {}
    for stage in range(1, count):
        if stage % workers != (stage - 1) % workers:
            found["F", stage] = [(stage - 1, seconds)]
            found["B", stage - 1] = [(stage, seconds)]
    return found


@pytest.mark.parametrize("microbatches", [4, 8, 20])
@pytest.mark.parametrize("workers", [2, 4])
def test_equal_stages(workers: int, microbatches: int) -> None:
    """Bubbles: (p - 1)(f + b) (Huang et al. 2019; Narayanan et al. 2019), that over v (Narayanan et al. 2021)."""
    f, b, w = 1.0, 1.5, 0.5
    bubble = (workers - 1) * (f + b)
    stage = StageTime(f, b)
    messages = chained(workers, workers, 0.0)
    for schedule in ("gpipe", "1f1b"):
        whole = microbatches * (f + b) + bubble
        assert pipeline_seconds(schedule, [stage] * workers, workers, microbatches) == pytest.approx(whole)
        found = played(tables(schedule, workers, microbatches, [stage] * workers), messages)
        assert max(found) == pytest.approx(whole)
    halves = [StageTime(f / 2, b / 2)] * (2 * workers)
    whole = microbatches * (f + b) + bubble / 2
    assert pipeline_seconds("interleaved", halves, workers, microbatches) == pytest.approx(whole)
    both = played(tables("interleaved", workers, microbatches, halves), chained(2 * workers, workers, 0.0))
    assert max(both) == pytest.approx(whole)
    split = [StageTime(f, b - w, w)] * workers
    parts = played(tables("zero-bubble", workers, microbatches, split), messages)
    assert max(parts) == pytest.approx(microbatches * (f + b) + (workers - 1) * (f + b - 2 * w), rel=0.12)


def test_two_stages_by_hand() -> None:
    """
    0  F0 F1 .. .. B0 .. B1      F 1 s, B 2 s on the first, F 2 s, B 3 s on the second, messages 0.5 s
    1  .. F0 .. B0 F1 .. B1
    """
    stages, messages = [StageTime(1.0, 2.0), StageTime(2.0, 3.0)], chained(2, 2, 0.5)
    # the second begins at 1.5 s: F0 to 3.5, B0 to 6.5, F1 to 8.5, B1 to 11.5; the first does B1 from 12 to 14
    assert played(tables("1f1b", 2, 2, stages), messages) == [14.0, 11.5]
    # what comes after passes is waited for at the end
    assert played(tables("1f1b", 2, 2, stages, after=1.0), messages) == [15.0, 12.5]
    # hosts that need 4 s for each pass: the second is done with B1 at 16, the first has 16 s of its own, too
    assert played(tables("1f1b", 2, 2, stages, launching=4.0), messages) == [18.5, 16.0]
    # a first pass that takes 0.25 s longer is waited for by both
    longer = tables("1f1b", 2, 2, stages)
    longer[0][0] = TimedPass(longer[0][0].action, 1.25)
    assert played(longer, messages) == [14.25, 11.75]


def test_messages_follow_each_other() -> None:
    stages = [StageTime(1.0, 1.0), StageTime(1.0, 1.0)]
    found = played(tables("gpipe", 2, 3, stages), chained(2, 2, 4.0))
    # values arrive at 5, 9, 13; the second is done with F2 at 14, B0 15 ... B2 17; gradients arrive at 19, 23, 27
    assert found == [28.0, 17.0]
    assert pipeline_seconds("gpipe", [StageTime(1, 1, 0, 4, 4)] * 2, 2, 30) >= 29 * 4.0


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved"])
def test_formulas_of_unequal_stages(schedule: str) -> None:
    per_worker = 2 if schedule == "interleaved" else 1
    count = 4 * per_worker
    stages = [StageTime(1.0 + 0.1 * s % 0.4, 2.0 + 0.2 * (s % 3), 0.0, 0.05, 0.05) for s in range(count)]
    found = played(tables(schedule, 4, 64, stages), chained(count, 4, 0.05))
    assert pipeline_seconds(schedule, stages, 4, 64) == pytest.approx(max(found), rel=0.04)


def shares(passed: Passed) -> tuple[float, float, float]:
    return passed.communication, passed.exposed, passed.slowed


def piece(compute: float, gather: float = 0.0, *reductions: float) -> TimedPiece:
    """Return a piece whose reductions are over groups of their own."""
    sent = (Collective("reduce_scatter", 8, Group(2, stride)) for stride, _ in enumerate(reductions, 1))
    return TimedPiece(Piece(0, 1, Communication(reductions=tuple(sent))), compute, gather, reductions)


def sharded(
    pieces: Sequence[TimedPiece], first: float = 0.0, overlap: float = 1.0, *, blocking: bool = False
) -> tuple[float, float, float]:
    whole = [piece(0.0, first), *pieces]
    return shares(overlapped(PassSeconds(8.0), whole, overlap, blocking=blocking))


def test_gathers_hide_behind_the_block_before() -> None:
    # gather 1 | compute 2, gather 1 meanwhile | compute 2 | ... : only the first gather is seen
    pieces = [piece(2.0, 1.0) for _ in range(4)]
    assert sharded(pieces) == (4.0, 1.0, 0.0)
    # at half speed for the second of each of three gathers: 1 | 1 + 1.5 | 1 + 1.5 | 1 + 1.5 | 2
    assert sharded(pieces, overlap=2.0) == (4.0, 1.0, 1.5)
    # longer than a block: the second waits 1 s, and so on
    slow = [piece(2.0, 3.0) for _ in range(4)]
    assert sharded(slow, 1.0) == (13.0, 1.0 + 3.0 + 3 * 1.0, 0.0)
    # slower compute waits less for them, and the pass takes as long
    assert sharded(slow, 1.0, overlap=1.25) == (13.0, 1.0 + 3.0 + 3 * 0.5, 3 * 0.5)
    assert sharded(slow, 1.0, blocking=True) == (13.0, 13.0, 0.0)


def test_scatters_stand_behind_gathers() -> None:
    # g1 0-1, c1 1-3, g2 1-2, c2 3-5, s1 3-5, s2 5-7
    assert sharded([piece(2.0, 1.0, 2.0) for _ in range(2)]) == (6.0, 3.0, 0.0)
    # the sums over dp are on a channel of their own: after s1 5-6, after s2 7-8
    assert sharded([piece(2.0, 1.0, 2.0, 1.0) for _ in range(2)]) == (8.0, 4.0, 0.0)


def test_buckets() -> None:
    def passed(seconds: float, overlap: float = 1.0) -> tuple[float, float, float]:
        pieces = [piece(1.0, 0.0, seconds), piece(1.0, 0.0, seconds), piece(3.0)]
        return shares(overlapped(PassSeconds(5.0), pieces, overlap, blocking=False))

    # complete at 1 and 2 of 5 s: sent 1-4, 4-7
    assert passed(3.0) == (6.0, 2.0, 0.0)
    assert passed(1.0) == (2.0, 0.0, 0.0)
    # at half speed from 1 to 2 and from 2.5 to 3.5: the second is complete at 2.5, and all at 6
    assert passed(1.0, 2.0) == (2.0, 0.0, 1.0)
    # at half speed from 1 to 7: only 4 of 5 s are done then, and nothing is left to wait for
    assert passed(3.0, 2.0) == (6.0, 0.0, 3.0)


def test_what_a_worker_sends_waits_for_what_it_sent_before() -> None:
    """Two passes of one second that send for ten each: the second sends when the first has; alone it ends at 11."""
    table = [TimedPass(Action(BACKWARD, stage, 0), 1.0, after=10.0, sending=10.0) for stage in (1, 0)]
    assert played([table], {}) == [21.0]
    assert played([table[:1]], {}) == [11.0]
