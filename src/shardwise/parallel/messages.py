"""How fast messages are between the workers of a pipeline, where nobody has planned with it: by sending some.

Where a pipeline is best cut depends on what there is to send at each place, and on how long that takes: between two
processes of a host a megabyte is nothing, over a link of 100 Mb/s it is 80 ms.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
import torch.distributed as dist

from shardwise.parallel.mesh import Mesh
from shardwise.strategy import Strategy

CPU_BYTES, ACCELERATOR_BYTES = 2**18, 2**22
"""Of the message that is timed: an accelerator sends more in the same time."""

REPEATS = 4
"""The quickest counts: a message is slow for many reasons that are gone with the next one."""

MUCH = 4.0
"""Times that a link must be slower than assumed for cuts to depend on it: they are not to change with the noise."""


def much_slower(seconds_per_byte: Sequence[float], bytes_per_second: float) -> tuple[float, ...]:
    """How many times slower each link is than assumed, 1 where it is not by `MUCH`; nothing where none is."""
    factors = tuple(seconds * bytes_per_second for seconds in seconds_per_byte)
    return tuple(factor if factor > MUCH else 1.0 for factor in factors) if any(f > MUCH for f in factors) else ()


def hops_of(strategy: Strategy) -> int:
    """From worker to worker that messages of a pipeline take: from the last one to the first, too, with more stages."""
    return strategy.pp if strategy.stages_per_worker > 1 else strategy.pp - 1


def measured_links(mesh: Mesh) -> list[float]:
    """Seconds per byte of each hop of a pipeline. Collective.

    Of the slowest replica, while all replicas send; nothing where there is no pipeline, or its group sends nothing.
    """
    group = mesh.group("pp")
    if group is None or dist.get_backend(group) == "fake":
        return []
    workers, place = mesh.strategy.pp, mesh.coordinate("pp")
    hops = hops_of(mesh.strategy)
    found = torch.zeros(hops, dtype=torch.float64, device=mesh.device)
    for source in range(hops):
        target = (source + 1) % workers
        if place in (source, target):
            found[source] = _per_byte(place == source, target if place == source else source, mesh, group)
    dist.all_reduce(found, dist.ReduceOp.MAX, group=mesh.world)
    return [float(each) for each in found]


def _per_byte(first: bool, other: int, mesh: Mesh, group: dist.ProcessGroup) -> float:
    """Seconds of a message beyond those of an empty one, as the worker that sends it has them; 0 on the other."""
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
        small.item()  # waits for the device
        return time.perf_counter() - start

    tries = [(there_and_back(small), there_and_back(large)) for _ in range(1 + REPEATS)][1:]
    empty, full = (min(each) for each in zip(*tries, strict=True))
    return max(0.0, full - empty) / size if first else 0.0
