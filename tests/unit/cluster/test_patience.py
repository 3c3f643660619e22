"""Disturbed and impossible measurements are repeated for a bounded time, and the best one is kept."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence

import pytest

from shardwise.cluster.measure import patience as module
from shardwise.cluster.measure.patience import Patience

OWN = 0.5
"""Cores that each worker itself uses."""


class TwoHosts:
    """Team of three workers on two hosts, as the first of them sees it; the other host is idle but for its worker."""

    hosts = ((0, 1), (2,))

    def wait(self) -> None:
        pass

    def gathered(self, values: Sequence[float]) -> list[list[float]]:
        took, _, own = values
        return [list(values), list(values), [took, own, own]]


class Machine:
    """Clocks of a machine on which each measurement takes a second, while others use as many cores as `others` says."""

    def __init__(self, others: Sequence[float]) -> None:
        self.others: Iterator[float] = iter(others)
        self.now = self.busy = 0.0
        self.count = 0

    def measure(self) -> int:
        self.now += 1.0
        self.busy += next(self.others) + 2 * OWN
        self.count += 1
        return self.count


def kept(monkeypatch: pytest.MonkeyPatch, others: Sequence[float], seconds: float, wrong: int = 0) -> tuple[int, float]:
    """Return the number of the measurement that is kept, and how busy others were; the first `wrong` are impossible."""
    machine = Machine(others)
    monkeypatch.setattr(time, "perf_counter", lambda: machine.now)
    monkeypatch.setattr(time, "process_time", lambda: OWN * machine.now)
    monkeypatch.setattr(module, "busy_seconds", lambda: machine.busy)
    monkeypatch.setattr(module, "is_busy", lambda used: used > 0.5)
    patience = Patience(TwoHosts(), seconds)  # type: ignore[arg-type]
    return patience.kept(machine.measure, lambda number: number <= wrong), round(patience.busy, 6)


def test_an_undisturbed_measurement_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, [0.0], 60.0) == (1, 0.0)


def test_a_disturbed_one_is_repeated_until_others_are_done(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, [1.5, 0.8, 0.1], 60.0) == (3, 0.1)


def test_repeats_end_and_the_least_disturbed_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, [1.5, 0.8, 1.9, 1.2], 3.0) == (2, 0.8)


def test_no_time_for_repeats(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, [1.5], 0.0) == (1, 1.5)


def test_an_impossible_result_is_repeated_and_not_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    assert kept(monkeypatch, [0.0, 0.1], 60.0, wrong=1) == (2, 0.1)
