"""How much slower each of several workers computes that share a host's cores, measured by what each gets done.

A worker of one thread is timed by its own clock, which stands still while it waits for a core.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence

import torch

from shardwise.cluster.computing import Situation
from shardwise.cluster.team import Team

SIDE = 192
"""Of the matrices that are multiplied: a few hundred microseconds on a CPU's core."""

MOVED = 128 * 1024
"""Elements that are added up after each product."""


def shared(team: Team, settings: Sequence[Situation], seconds: float) -> dict[int, float]:
    """Workers -> how much longer each of them takes than one alone with all cores.

    Collective over all workers, of which the first ones compute.

    Args:
        team: all workers.
        settings: (workers, threads of each); the first is one worker with all cores.
        seconds: to spend on each of them.
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
    """Seconds of one product and one sum, the mean over so many seconds."""
    a, b = (torch.randn(SIDE, SIDE, device=device) for _ in range(2))
    x, y = (torch.randn(MOVED, device=device) for _ in range(2))
    count, begin, start = 0, time.perf_counter(), clock()
    while time.perf_counter() - begin < seconds:
        torch.mm(a, b)
        x.add(y)
        count += 1
    return (clock() - start) / count
