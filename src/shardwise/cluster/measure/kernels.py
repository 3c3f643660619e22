"""Measure kernel curves of a device: one worker alone, and several workers that share a host's cores."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from shardwise.cluster.cluster import KernelCurve, Sample
from shardwise.cluster.measure.arena import Arena
from shardwise.cluster.measure.kernel_cases import KernelCase
from shardwise.cluster.measure.team import Team
from shardwise.cluster.measure.timer import rounded, spread, timed

Situation = tuple[int, int]
"""Measuring situation: (workers of one host at the same time, threads of each)."""


@dataclass(frozen=True, slots=True)
class MeasuredKernel:
    """A case together with what it computes, in the terms of `KernelCurve` and `Sample`."""

    case: KernelCase
    kind: str
    operation: str
    dtype: str
    backward: bool
    shape: tuple[int, ...]


def kernel_curves(
    measured: Sequence[MeasuredKernel], team: Team, situation: Situation, seconds: float, advance: Callable[[int], None]
) -> list[KernelCurve]:
    """Measure the kernel curves of a device in one situation. Collective over all workers; only the first ones measure.

    Args:
        measured: cases to measure.
        team: all workers.
        situation: number of workers that measure, and number of threads of each.
        seconds: time to spend on each case.
        advance: progress callback, called with the number of cases that were just finished.
    """
    workers, threads = situation
    samples: list[tuple[MeasuredKernel, Sample]] = []
    team.first(workers)
    if team.rank < workers:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        samples = _samples(measured, team, workers, seconds, advance)
        torch.set_num_threads(before)
    team.wait()
    return _curves(samples, situation)


def _samples(
    measured: Sequence[MeasuredKernel], team: Team, workers: int, seconds: float, advance: Callable[[int], None]
) -> list[tuple[MeasuredKernel, Sample]]:
    """Run each case on all measuring workers at the same time, and return the median time over the workers."""
    arena = Arena(team.device)
    medians, spreads = [], []
    for each in measured:
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
        for each, value, wide in zip(measured, typical, widest, strict=True)
    ]


def _curves(samples: Sequence[tuple[MeasuredKernel, Sample]], situation: Situation) -> list[KernelCurve]:
    workers, threads = situation
    found: dict[tuple[str, str, str, bool], dict[tuple[int, ...], Sample]] = {}
    for measured, sample in samples:
        key = measured.kind, measured.operation, measured.dtype, measured.backward
        found.setdefault(key, {})[sample.shape] = sample
    return [
        KernelCurve(kind, dtype, tuple(by_shape.values()), operation, backward, workers, threads)
        for (kind, operation, dtype, backward), by_shape in found.items()
    ]
