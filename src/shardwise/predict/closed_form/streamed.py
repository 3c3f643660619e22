"""Step time of a pipeline that does not wait for the end of a step (`schedule=pipedream`), once it is full.

Steps follow each other without a bubble, so that one takes as long as the busiest worker computes and updates, or
longer where messages are slow: worker s of p has p - s microbatches in flight, and each (p - s)-th waits for a round
trip (Narayanan et al. 2021, PipeDream-2BW, section 3). Some steps are simulated pass by pass.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from shardwise.predict.closed_form.pipeline import Messages, TimedPass, played
from shardwise.splitting.schedule import Action, streamed

UPDATE = "U"
"""Kind of the action that stands for a worker's update."""

FILLING, FULL = 2, 4
"""Steps after which a simulated pipeline is full, and at which it ends; what is between them is measured."""


def stream_seconds(tables: Sequence[Sequence[TimedPass]], updates: Sequence[float], messages: Messages) -> float:
    """Return the seconds between the ends of two steps.

    More than three rounds of microbatches take linearly longer.

    Args:
        tables: passes of each worker in one step, in any order, by pipeline rank.
        updates: seconds that each worker needs after its passes.
        messages: messages between stages on different workers.
    """
    count, workers = len(tables[0]) // 2, len(tables)
    few = 3 * workers
    if count <= few + workers:
        return _period(tables, updates, messages)
    short, long = (_period([_shorter(t, n) for t in tables], updates, messages) for n in (few, few + workers))
    return short + (count - few) * (long - short) / workers


def _period(tables: Sequence[Sequence[TimedPass]], updates: Sequence[float], messages: Messages) -> float:
    ends = []
    for steps in (FILLING, FULL):
        unrolled = [_unrolled(t, rank, len(tables), updates[rank], steps) for rank, t in enumerate(tables)]
        ends.append(max(played(unrolled, messages)))
    return (ends[1] - ends[0]) / (FULL - FILLING)


def numbered(worker: int, workers: int, microbatches: int, step: int) -> list[Action]:
    """Return the actions of a step of the stream, with microbatches that are counted from the first step on."""
    half = step % 2
    found = streamed(worker, workers, microbatches, half, left=step > 0)
    starts = {half: step * microbatches, 1 - half: (step - 1) * microbatches}
    return [
        replace(each, microbatch=starts[each.microbatch // microbatches] + each.microbatch % microbatches)
        for each in found
    ]


def _unrolled(table: Sequence[TimedPass], rank: int, workers: int, update: float, steps: int) -> list[TimedPass]:
    known = {(each.action.kind, each.action.microbatch): each for each in table}
    count, found = len(table) // 2, list[TimedPass]()
    for step in range(steps):
        for action in numbered(rank, workers, count, step):
            found.append(replace(known[action.kind, action.microbatch % count], action=action))
        found.append(TimedPass(Action(UPDATE, rank, step), update))
    return found


def _shorter(table: Sequence[TimedPass], microbatches: int) -> list[TimedPass]:
    """Return the passes of the first microbatches and of the last one."""
    last = len(table) // 2 - 1
    numbers = {**{number: number for number in range(microbatches - 1)}, last: microbatches - 1}
    return [
        replace(each, action=replace(each.action, microbatch=numbers[each.action.microbatch]))
        for each in table
        if each.action.microbatch in numbers
    ]
