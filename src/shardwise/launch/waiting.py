"""Stopwatch of the time for which a worker waits for others: in collectives and in messages between stages.

On a CPU an operation of a process group is over when its `wait` returns, and torch's own code, too, calls `wait` on the
object that the operation returned. Only DDP waits in C++, at the end of its backward pass: `parallel.data.ddp` adds
that wait. On a GPU `wait` returns at once, and nothing is learned here.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

Interval = tuple[float, float]


@dataclass(slots=True)
class _Stopwatch:
    """Waits so far.

    Attributes:
        seconds: their sum.
        intervals: begin and end of each wait, in seconds of `time.perf_counter`; None while they are not recorded.
        main: identifier of the thread whose waits count.
    """

    seconds: float = 0.0
    intervals: list[Interval] | None = field(default=None)
    main: int = 0


_watch = _Stopwatch()


def waited() -> float:
    """Return the seconds that this worker has waited for others so far; only differences mean something."""
    return _watch.seconds


def counts() -> bool:
    """Return whether this thread's waits are counted now."""
    return threading.get_ident() == _watch.main


def add(begin: float) -> None:
    """Add a wait that began at `begin` of `time.perf_counter` and ends now; only the thread counts that trains."""
    if not counts():
        return
    end = time.perf_counter()
    _watch.seconds += end - begin
    if _watch.intervals is not None:
        _watch.intervals.append((begin, end))


@contextmanager
def counting() -> Iterator[None]:
    """Count inside the block the waits of the thread that runs it."""
    from torch.distributed import Work

    original, before = Work.wait, _watch.main

    def wait(work: Work, *arguments: Any, **named: Any) -> Any:
        begin = time.perf_counter()
        try:
            return original(work, *arguments, **named)
        finally:
            add(begin)

    setattr(Work, "wait", wait)  # noqa: B010 - an assignment would have to have the very type of torch's
    _watch.main = threading.get_ident()
    try:
        yield
    finally:
        setattr(Work, "wait", original)  # noqa: B010
        _watch.main = before


@contextmanager
def recorded() -> Iterator[list[Interval]]:
    """Record the waits inside the block one by one, and yield the list of them."""
    found: list[Interval] = []
    _watch.intervals = found
    try:
        yield found
    finally:
        _watch.intervals = None
