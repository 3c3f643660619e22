"""Repeat measurements that other programs disturb, for a bounded time, and keep the least disturbed one."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

from shardwise.cluster.measure.interference import busy_seconds, is_busy
from shardwise.cluster.measure.team import Team

T = TypeVar("T")


class Patience:
    """Time that is left for repeats, and how busy other programs kept the cores in the measurements that were kept.

    All workers come to equal decisions, because they are made of gathered numbers.

    Args:
        team: workers that measure.
        seconds: time for repeats of all measurements together.
    """

    def __init__(self, team: Team, seconds: float) -> None:
        self._team, self._left = team, seconds
        self._kept: list[tuple[float, float]] = []

    @property
    def busy(self) -> float:
        """Number of cores of a host that others used, on average over the measurements that were kept."""
        seconds = sum(took for took, _ in self._kept)
        return sum(took * used for took, used in self._kept) / seconds if seconds else 0.0

    def kept(self, measure: Callable[[], T], wrong: Callable[[T], bool] = lambda _: False) -> T:
        """Measure, again while others use the cores and time is left, and return the least disturbed result.

        Collective over all workers of the team.

        Args:
            measure: measurement; it returns equal results on all workers.
            wrong: whether a result is impossible; one that is not is preferred.
        """
        found: list[tuple[bool, float, float, T]] = []
        while True:
            result, took, used = self._measured(measure)
            found.append((wrong(result), used, took, result))
            if found[0] is not found[-1]:
                self._left -= took
            if not (found[-1][0] or is_busy(used)) or took > self._left:
                break
        _, used, took, result = min(found, key=lambda each: each[:2])
        self._kept.append((took, used))
        return result

    def _measured(self, measure: Callable[[], T]) -> tuple[T, float, float]:
        """Return a result, the seconds that it took, and the cores that others used meanwhile on the busiest host."""
        self._team.wait()
        start, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
        result = measure()
        mine = [time.perf_counter() - start, busy_seconds() - busy, time.process_time() - own]
        rows = self._team.gathered(mine)
        took = max(1e-6, rows[0][0])
        used = (rows[host[0]][1] - sum(rows[rank][2] for rank in host) for host in self._team.hosts)
        return result, took, max(0.0, *used) / took
