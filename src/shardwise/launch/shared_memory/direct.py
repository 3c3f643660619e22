"""Collectives that read the tensors of other workers where they are, without a copy to slots.

The slots carry addresses only. All workers tell theirs, read each other's memory, and wait until all have read:

    bytes that a worker copies and adds, of n bytes and p workers    direct                     through slots
    all_reduce                                                       2 n (p-1)/p + n/p added    3 n (p-1)/p + n/p added
    reduce_scatter                                                   n (p-1)/p                  2 n (p-1)/p
    all_gather                                                       n (p-1)/p                  n + n (p-1)/p
    broadcast                                                        n                          n, twice
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from shardwise.launch.shared_memory.reduction import Reduction
from shardwise.launch.shared_memory.slots import Slots

LEAST_BYTES = 4 * 2**20
"""Bytes from which it is faster than slots: what fits into a few of them is written without waiting."""

CHUNK_BYTES = 2**18
"""Bytes of each other worker that are added at once: they stay in the processor's cache."""


class Direct:
    """Collective whose workers read each other's memory.

    Args:
        slots: slots of the group.
        told: tensors of which the others learn the addresses.
        read: function of those addresses by rank, each in the order of that worker's `told`, which does the reading.
    """

    def __init__(self, slots: Slots, told: Sequence[Tensor], read: Callable[[list[list[int]]], None]) -> None:
        self._slots, self._told, self._read = slots, told, read

    def start(self) -> bool:
        """Do nothing: the others wait until this worker has read."""
        return False

    def finish(self) -> None:
        """Tell the addresses, read, and wait until all have read."""
        slots = self._slots
        own = [tensor.data_ptr() for tensor in self._told]
        slots.claim(torch.int64)[: len(own)] = torch.tensor(own)
        slots.publish()
        addresses = []
        for rank in range(slots.count):
            if rank == slots.rank:
                addresses.append(own)
                continue
            addresses.append(slots.take(rank, torch.int64)[: len(own)].tolist())
            slots.release(rank)
        self._read(addresses)
        slots.meet()


def all_reduce(slots: Slots, flat: Tensor, reduction: Reduction) -> Direct:
    """Return the all-reduce of a flat tensor in place: each worker reduces its part, then all copy the parts."""
    size = -(-len(flat) // slots.count)
    parts = [flat[rank * size : (rank + 1) * size] for rank in range(slots.count)]
    offsets = [rank * size * flat.itemsize for rank in range(slots.count)]

    def read(addresses: list[list[int]]) -> None:
        mine = parts[slots.rank]
        _combine(slots, mine, mine, [address + offsets[slots.rank] for (address,) in addresses], reduction)
        slots.meet()
        for rank, (address,) in enumerate(addresses):
            if rank != slots.rank and len(parts[rank]):
                slots.read(rank, address + offsets[rank], parts[rank])

    return Direct(slots, [flat], read)


def reduce_scatter(slots: Slots, output: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> Direct:
    """Return the reduce-scatter of flat parts of each worker, see `collectives.reduce_scatter`."""

    def read(addresses: list[list[int]]) -> None:
        _combine(slots, parts[slots.rank], output, [each[slots.rank] for each in addresses], reduction)

    return Direct(slots, parts, read)


def all_gather(slots: Slots, outputs: Sequence[Tensor], part: Tensor) -> Direct:
    """Return the all-gather of a flat tensor of each worker; this worker's own part is at its place already."""

    def read(addresses: list[list[int]]) -> None:
        for rank, (address,) in enumerate(addresses):
            if rank != slots.rank:
                slots.read(rank, address, outputs[rank])

    return Direct(slots, [part], read)


def broadcast(slots: Slots, data: Tensor, root: int) -> Direct:
    """Return the broadcast of a flat tensor."""

    def read(addresses: list[list[int]]) -> None:
        if slots.rank != root:
            slots.read(root, addresses[root][0], data)

    return Direct(slots, [data], read)


def _combine(slots: Slots, mine: Tensor, output: Tensor, addresses: Sequence[int], reduction: Reduction) -> None:
    """Write to `output` the reduction of `mine` and of as much memory of each other worker at an address."""
    step = CHUNK_BYTES // mine.itemsize
    buffers = mine.new_empty(slots.count, min(step, len(mine)))
    for start in range(0, len(mine), step):
        chunk = mine[start : start + step]
        found = [buffer[: len(chunk)] for buffer in buffers]
        for rank, address in enumerate(addresses):
            if rank == slots.rank:
                found[rank] = chunk
            else:
                slots.read(rank, address + start * mine.itemsize, found[rank])
        reduction.combine(found, output[start : start + step])
