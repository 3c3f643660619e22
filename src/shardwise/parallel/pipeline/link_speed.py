"""Measure point-to-point bandwidth between pipeline stages if no plan provides it.

The best cut points of a pipeline depend on the bytes sent at each one and on how long they take: between two processes
of one host a megabyte is almost free, over a 100 Mb/s link it takes 80 ms.
"""

from __future__ import annotations

import time

import torch
import torch.distributed as dist

from shardwise.parallel.mesh import Mesh
from shardwise.splitting.slow_links import link_count

CPU_BYTES, ACCELERATOR_BYTES = 2**18, 2**22
"""Size in bytes of the timed message: an accelerator sends more in the same time."""

REPEATS = 4
"""Timed repetitions, of which the fastest counts: most causes of a slow message are gone at the next one."""


def measured_links(mesh: Mesh) -> list[float]:
    """Measure the seconds per byte of each link of a pipeline. Collective over all workers.

    All replicas send at the same time, and the slowest one counts. Returns an empty list if there is no pipeline or if
    its group sends nothing (the fake backend).
    """
    group = mesh.group("pp")
    if group is None or dist.get_backend(group) == "fake":
        return []
    workers, pipeline_rank = mesh.strategy.pp, mesh.coordinate("pp")
    count = link_count(mesh.strategy)
    found = torch.zeros(count, dtype=torch.float64, device=mesh.device)
    for source in range(count):
        target = (source + 1) % workers
        if pipeline_rank in (source, target):
            found[source] = _per_byte(
                pipeline_rank == source, target if pipeline_rank == source else source, mesh, group
            )
    dist.all_reduce(found, dist.ReduceOp.MAX, group=(mesh.whole or mesh).world)
    return [float(each) for each in found]


def _per_byte(first: bool, other: int, mesh: Mesh, group: dist.ProcessGroup) -> float:
    """Measure the seconds per byte of a large message beyond a one-byte one. Returns 0 on the receiving worker."""
    size = CPU_BYTES if mesh.device.type == "cpu" else ACCELERATOR_BYTES
    small, large = (torch.zeros(count, dtype=torch.uint8, device=mesh.device) for count in (1, size))
    rank = dist.get_global_rank(group, other)

    def there_and_back(message: torch.Tensor) -> float:
        start = time.perf_counter()
        if first:
            dist.send(message, rank, group)
            dist.recv(small, rank, group)
        else:
            dist.recv(message, rank, group)
            dist.send(small, rank, group)
        small.item()  # wait for the device
        return time.perf_counter() - start

    tries = [(there_and_back(small), there_and_back(large)) for _ in range(1 + REPEATS)][1:]
    empty, full = (min(each) for each in zip(*tries, strict=True))
    return max(0.0, full - empty) / size if first else 0.0
