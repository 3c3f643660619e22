"""How long a call takes on a device, as training makes it: see `arena`.

What one thread computes on a CPU is timed by that thread's own clock, which stands still while the thread waits for a
core: other programs then make the spread larger, but not the times. Several threads are timed by the clock on the wall.
Calls for which the system had to give memory count only where there are no others: a training has its memory after the
first steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.cluster.arena import Arena
from shardwise.cluster.cases import Case

LEAST = 3
"""Calls of a case that are timed, whatever they take."""

MOST = 400

TRIED = 12
"""Calls after which it is given up to wait for some that need no memory from the system."""

PAGES = 16
"""That the system may give during a call all the same."""

LONG_SECONDS = 0.01
"""A call that takes longer is warmed up once only."""

ASLEEP_CYCLES = 3_000_000
"""How long a GPU is kept busy before calls that are timed together, so that the host has started them all by then."""

TOGETHER = 10
"""Calls that are timed together on a GPU."""


def timed(case: Case, arena: Arena, seconds: float) -> list[float]:
    """Seconds of each of several calls.

    Args:
        case: what to call.
        arena: where its operands come from and its results go.
        seconds: to spend on all of it.
    """
    with torch.no_grad():
        for _ in range(2):  # libraries choose and keep what they do at the first call
            start = time.perf_counter()
            case.call(*case.make(arena))
            if time.perf_counter() - start > LONG_SECONDS:
                break
        once = _on_gpu if arena.device.type == "cuda" else _on_cpu
        found: list[float] = []
        clearing: list[float] = []
        begin = time.perf_counter()
        while len(found) < LEAST or (time.perf_counter() - begin < seconds and len(found) < MOST):
            before = _pages()
            took = once(case, arena)
            (found if _pages() - before <= PAGES else clearing).append(took)
            if len(found) + len(clearing) >= TRIED and len(found) < LEAST:
                break
    arena.clear()
    return found or clearing


def _pages() -> int:
    """How many pages of memory the system has given to this process; 0 where it does not say."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _on_cpu(case: Case, arena: Arena) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    operands = case.make(arena)
    _touch(operands)
    start = clock()
    result = case.call(*operands)
    end = clock()
    arena.keep(result)
    return end - start


def _touch(operands: Sequence[Any]) -> None:
    """The first operand is in the caches, as if the kernel before had written it."""
    first = next(operand for operand in operands if isinstance(operand, Tensor))
    first.data.mul_(1.0)  # outside of what autograd watches


def _on_gpu(case: Case, arena: Arena) -> float:
    """A GPU computes behind the host: several calls between two events, started while it is busy with nothing."""
    operands = [case.make(arena) for _ in range(TOGETHER)]
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    torch.cuda._sleep(ASLEEP_CYCLES)  # type: ignore[no-untyped-call]
    start.record()
    results = [case.call(*each) for each in operands]
    end.record()
    end.synchronize()
    arena.keep(results)
    return float(start.elapsed_time(end)) * 1e-3 / TOGETHER


def rounded(seconds: float) -> float:
    """As many digits as a measurement has, so that a file of them can be read."""
    return float(f"{seconds:.4g}")


def spread(values: Sequence[float]) -> float:
    """Interquartile range over the median."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
