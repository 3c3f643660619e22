"""Time a call on a device under the conditions of a training step, see `arena`.

A call that runs on one CPU thread is timed by that thread's own clock, which stands still while the thread waits for a
core: other programs then increase the spread, but not the times. Several threads are timed by the wall clock. Calls
during which the system had to provide memory count only if there are no others, because a training has all its memory
after the first steps.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from shardwise.cluster.measure.arena import Arena
from shardwise.cluster.measure.kernel_cases import KernelCase

LEAST = 3
"""Fewest timed calls of a case, no matter how long they take."""

MOST = 400

TRIED = 12
"""Number of calls after which to stop waiting for calls that need no memory from the system."""

PAGES = 16
"""Page faults up to which a call counts as one that needs no memory from the system."""

LONG_SECONDS = 0.01
"""Seconds of a call above which a single warm-up call is enough."""

ASLEEP_CYCLES = 6_000_000
"""Cycles that a GPU sleeps before calls that are timed together, so that the host has launched all of them by then."""

TOGETHER = 10
"""Number of calls that are timed together on a GPU."""


def timed(case: KernelCase, arena: Arena, seconds: float) -> list[float]:
    """Return the seconds of each of several calls of a case.

    Args:
        case: case to call.
        arena: memory that provides the operands and keeps the results alive.
        seconds: time to spend on all calls together.
    """
    with torch.no_grad():
        for _ in range(2):  # at the first call, libraries choose an algorithm and cache the choice
            start = time.perf_counter()
            case.call(*case.make(arena))
            if time.perf_counter() - start > LONG_SECONDS:
                break
        once = _on_cpu
        if arena.device.type == "cuda":
            once = _on_gpu
            once(case, arena)  # from here on torch's allocator has the memory of all calls, and need not ask the driver
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
    """Return the number of minor page faults of this process so far; 0 on Windows, which does not report it."""
    if sys.platform == "win32":
        return 0
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt


def _on_cpu(case: KernelCase, arena: Arena) -> float:
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    operands = case.make(arena)
    _touch(operands)
    start = clock()
    result = case.call(*operands)
    end = clock()
    arena.keep(result)
    return end - start


def _touch(operands: Sequence[Any]) -> None:
    """Bring the first tensor operand into the caches, as if the previous kernel had written it."""
    first = next(operand for operand in operands if isinstance(operand, Tensor))
    first.data.mul_(1.0)  # invisible to autograd


def _on_gpu(case: KernelCase, arena: Arena) -> float:
    """Return the mean seconds of several calls on a GPU, measured between two events.

    A GPU runs behind the host. It first sleeps, so that the launches do not limit the measured calls.
    """
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
    """Round to four significant digits, about the precision of a measurement, which keeps the file readable."""
    return float(f"{seconds:.4g}")


def spread(values: Sequence[float]) -> float:
    """Return the interquartile range divided by the median; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    low, middle, high = statistics.quantiles(values, n=4)
    return (high - low) / middle
