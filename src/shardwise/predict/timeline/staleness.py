"""Waiting of workers that may be ahead of each other, by the events of many steps.

A worker begins step c when the slowest worker has taken c - S steps or more. With a bound, all take as many steps as
the slowest one in the long run: a bound hides that steps differ in length, not that a worker is always slow.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

STEPS = 200
"""Steps of each worker that are simulated."""


@dataclass(frozen=True, slots=True)
class Paces:
    """Paces of the workers of a training with staleness.

    Attributes:
        step_seconds: seconds between two updates, each of one contribution per worker.
        waited: share of its time for which each worker waits for the slowest one, 0 to 1.
    """

    step_seconds: float
    waited: tuple[float, ...]


def paces(seconds: Callable[[int, int], float], workers: int, staleness: int | None, steps: int = STEPS) -> Paces:
    """Simulate `steps` steps of the slowest worker.

    Args:
        seconds: (worker, number of its step) -> seconds of the step without waiting.
        workers: number of workers.
        staleness: steps by which a worker may be ahead; None: any number.
        steps: number of updates until which the simulation runs.
    """
    ends: list[list[float]] = [[] for _ in range(workers)]
    waited = [0.0] * workers
    ready = [0.0] * workers
    contributions = 0
    last = 0.0
    while contributions < steps * workers:
        able = [_begin(ends, worker, ready[worker], staleness) for worker in range(workers)]
        finish = [
            float("inf") if begin is None else begin + seconds(worker, len(ends[worker]))
            for worker, begin in enumerate(able)
        ]
        worker = min(range(workers), key=finish.__getitem__)
        begin = able[worker]
        assert begin is not None
        waited[worker] += begin - ready[worker]
        ready[worker] = last = finish[worker]
        ends[worker].append(last)
        contributions += 1
    return Paces(last / steps, tuple(wait / last for wait in waited))


def _begin(ends: list[list[float]], worker: int, ready: float, staleness: int | None) -> float | None:
    """Return when a worker can begin its next step; None if that depends on steps that are not simulated yet."""
    needed = 0 if staleness is None else len(ends[worker]) - staleness
    if needed <= 0:
        return ready
    if any(len(each) < needed for each in ends):
        return None
    return max(ready, *(each[needed - 1] for each in ends))
