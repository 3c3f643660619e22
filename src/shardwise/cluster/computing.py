"""Curves of the kernels of a device, measured: one worker alone, and several that share a host's cores."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardwise.cluster.arena import Arena
from shardwise.cluster.cases import Case
from shardwise.cluster.cluster import KernelCurve, Sample
from shardwise.cluster.team import Team
from shardwise.cluster.timer import rounded, spread, timed

Situation = tuple[int, int]
"""(workers of one host at the same time, threads of each)."""


@dataclass(frozen=True, slots=True)
class Noted:
    """A case with what it computes, as in `KernelCurve` and `Sample`."""

    case: Case
    kind: str
    operation: str
    dtype: str
    backward: bool
    shape: tuple[int, ...]


def kernel_curves(
    noted: Sequence[Noted], team: Team, situation: Situation, seconds: float, advance: Callable[[int], None]
) -> list[KernelCurve]:
    """The curves of a device in one situation; collective over all workers, of which only the first ones measure.

    Args:
        noted: what to measure.
        team: all workers.
        situation: how many of them measure, with how many threads.
        seconds: to spend on each case.
        advance: is told how many cases have been done.
    """
    workers, threads = situation
    samples: list[tuple[Noted, Sample]] = []
    team.first(workers)
    if team.rank < workers:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        samples = _samples(noted, team, workers, seconds, advance)
        torch.set_num_threads(before)
    team.wait()
    return _curves(samples, situation)


def _samples(
    noted: Sequence[Noted], team: Team, workers: int, seconds: float, advance: Callable[[int], None]
) -> list[tuple[Noted, Sample]]:
    """Every worker runs each case at the same time as the others; the typical worker's times count."""
    arena = Arena(team.device)
    medians, spreads = [], []
    for each in noted:
        team.wait(workers)
        found = timed(each.case, arena, seconds)
        medians.append(statistics.median(found))
        spreads.append(spread(found))
        advance(1)
    by_rank = team.gathered(medians, workers), team.gathered(spreads, workers)
    typical = [statistics.median(column) for column in zip(*by_rank[0], strict=True)]
    widest = [max(column) for column in zip(*by_rank[1], strict=True)]
    return [
        (each, Sample(each.shape, rounded(value), round(wide, 3)))
        for each, value, wide in zip(noted, typical, widest, strict=True)
    ]


def _curves(samples: Sequence[tuple[Noted, Sample]], situation: Situation) -> list[KernelCurve]:
    workers, threads = situation
    found: dict[tuple[str, str, str, bool], dict[tuple[int, ...], Sample]] = {}
    for noted, sample in samples:
        key = noted.kind, noted.operation, noted.dtype, noted.backward
        found.setdefault(key, {})[sample.shape] = sample
    return [
        KernelCurve(kind, dtype, tuple(by_shape.values()), operation, backward, workers, threads)
        for (kind, operation, dtype, backward), by_shape in found.items()
    ]
