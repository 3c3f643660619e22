"""Measure how much slower each of several workers computes when they share a host's cores.

The measure is the work that each worker gets done. A worker of one thread is timed by its own clock, which stands still
while the thread waits for a core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from shardwise.cluster.measure.kernels import Situation
from shardwise.cluster.measure.team import Team

SIDE = 192
"""Rows and columns of the multiplied matrices: one matmul takes a few hundred microseconds on a CPU core."""

MOVED = 128 * 1024
"""Elements that are added after each matmul."""


def shared(team: Team, settings: Sequence[Situation], seconds: float) -> dict[int, float]:
    """Map each number of workers to the slowdown of each of them, compared with one worker that has all cores.

    Collective over all workers; the first ones compute.

    Args:
        team: all workers.
        settings: (workers, threads of each); the first is one worker with all cores.
        seconds: time to spend on each setting.
    """
    took = []
    for workers, threads in settings:
        team.first(workers)
        if team.rank < workers:
            before = torch.get_num_threads()
            torch.set_num_threads(threads)
            team.wait(workers)
            mine = _each(team.device, seconds, time.thread_time if threads == 1 else time.perf_counter)
            torch.set_num_threads(before)
            took.append(statistics.mean(row[0] for row in team.gathered([mine], workers)))
        team.wait()
    return {workers: each / took[0] for (workers, _), each in zip(settings, took, strict=False) if workers > 1}


def _each(device: torch.device, seconds: float, clock: Callable[[], float]) -> float:
    """Return the mean seconds of one matmul and one addition, repeated for `seconds`."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    x, y = (torch.randn(MOVED, device=device) for _ in range(2))
    count, begin, start = 0, time.perf_counter(), clock()
    while time.perf_counter() - begin < seconds:
        torch.mm(a, b)
        x.add(y)
        count += 1
    return (clock() - start) / count
