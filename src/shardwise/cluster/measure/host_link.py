"""Measure the host memory of a GPU: its size, its bandwidth from the processors, and its bandwidth from the device.

All workers measure at the same time, as they train: they share the host's memory, and often a link to it.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from shardwise.cluster.measure import machine
from shardwise.cluster.measure.team import Team

BYTES = 256 * 2**20
"""Bytes that are copied: more than caches hold, as in a training where all slices of a model are copied."""

REPEATS = 5


def host_of(team: Team, size: int = BYTES) -> dict[str, Any]:
    """Measure this device's share of its host, as fields of `cluster.Device`; the slowest worker counts. Collective.

    Args:
        team: all workers.
        size: bytes to copy.
    """
    there = torch.zeros(size // 4, pin_memory=team.device.type == "cuda")
    here = torch.zeros(size // 4, device=team.device)
    other = torch.zeros(size // 4)
    updating = 2 * size / _seconds(team, lambda: other.add_(1.0))  # each byte is read and written
    fetching = size / _seconds(team, lambda: here.copy_(there, non_blocking=True))
    returning = size / _seconds(team, lambda: there.copy_(here, non_blocking=True))
    found = team.gathered([updating, min(fetching, returning)])
    return {
        "host_memory_bytes": machine.memory_bytes() // max(map(len, team.hosts)),
        "host_memory_bandwidth": min(row[0] for row in found),
        "host_bandwidth": min(row[1] for row in found),
    }


def _seconds(team: Team, call: Callable[[], object]) -> float:
    """Return the median seconds of several calls that all workers begin together, after one warm-up call."""
    found = []
    for _ in range(REPEATS + 1):
        team.wait()
        start = time.perf_counter()
        call()
        if team.device.type == "cuda":
            torch.cuda.synchronize(team.device)
        found.append(time.perf_counter() - start)
    return statistics.median(found[1:])
