"""Measure how much slower a device computes while it communicates."""

from __future__ import annotations

import statistics
import time

import torch
import torch.distributed as dist

from shardwise.cluster.measure.team import Team

SIDE, GPU_SIDE = 512, 4096
"""Rows and columns of the multiplied matrices: one matmul takes some milliseconds on a CPU core, and on a GPU."""

BYTES, GPU_BYTES = 4 * 2**20, 2**31
"""Bytes of the all-reduce that is in flight meanwhile: it takes longer than the matmul."""


def overlap(team: Team, workers: int, threads: int, seconds: float) -> float:
    """Return the slowdown of computation while the workers all-reduce gradients, at least 1.

    Collective over all workers; the first `workers` compute with `threads` threads each.
    """
    group = dist.new_group(list(range(workers)))
    found = 1.0
    if team.rank < workers:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        alone, meanwhile = _compared(team, group, workers, seconds)
        torch.set_num_threads(before)
        ratios = team.gathered([meanwhile / alone], workers)
        found = max(1.0, statistics.median(row[0] for row in ratios))
    team.wait()
    if team.rank < workers:
        dist.destroy_process_group(group)
    return found


def _compared(team: Team, group: dist.ProcessGroup, workers: int, seconds: float) -> tuple[float, float]:
    """Return the median seconds of a matmul (alone, during an all-reduce), measured alternately."""
    side, size = (GPU_SIDE, GPU_BYTES) if team.device.type == "cuda" else (SIDE, BYTES)
    a, b = (torch.randn(side, side, device=team.device) for _ in range(2))
    message = torch.zeros(size // 4, device=team.device)
    alone: list[float] = []
    meanwhile: list[float] = []
    dist.all_reduce(message, group=group)
    for _ in range(max(3, int(seconds / 0.05))):
        team.wait(workers)
        alone.append(_product(a, b))
        team.wait(workers)
        pending = dist.all_reduce(message, group=group, async_op=True)
        meanwhile.append(_product(a, b))
        assert pending is not None
        pending.wait()
        if team.device.type == "cuda":  # the host does not wait for a message, and the next matmul is to be alone
            torch.cuda.synchronize(team.device)
    return statistics.median(alone), statistics.median(meanwhile)


def _product(a: torch.Tensor, b: torch.Tensor) -> float:
    start = time.perf_counter()
    torch.mm(a, b)
    if a.device.type == "cuda":  # not of the whole device, which would be done with the message, too
        torch.cuda.current_stream(a.device).synchronize()
    return time.perf_counter() - start
