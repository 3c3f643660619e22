"""Distribute whole tensors over workers: for updates under ZeRO-1, and for writing checkpoints."""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch._C._distributed_c10d import _broadcast_coalesced

BUCKET_BYTES = 64 * 2**20
"""Largest total size in bytes of the tensors that one broadcast message carries."""


def deal(sizes: Mapping[str, int], workers: int) -> dict[str, int]:
    """Assign each name to a worker so that the workers' total sizes are about equal.

    Greedy: the largest tensor first, each to the worker with the smallest load so far.

    >>> deal({"a": 4, "b": 3, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads = [(0, worker) for worker in range(workers)]  # a heap of (load, worker), least load first
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owner = loads[0]
        owners[name] = owner
        heapq.heapreplace(loads, (load + max(sizes[name], 1), owner))
    return owners


class DealtParameters:
    """ZeRO-1: each replica updates the parameters assigned to it and broadcasts them to the others.

    Whole parameters are assigned, not slices. Every optimizer that treats parameters one by one therefore works
    unchanged, even one that uses a parameter's shape or norm.

    Attributes:
        mine: names of the parameters that this replica updates; may be empty.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup) -> None:
        owners = deal({name: parameter.numel() for name, parameter in parameters.items()}, group.size())
        self.mine = [name for name in parameters if owners[name] == group.rank()]
        self._group = group
        self._by_owner: list[list[Tensor]] = [[] for _ in range(group.size())]
        for name, parameter in parameters.items():
            self._by_owner[owners[name]].append(parameter.detach())

    def exchange(self) -> None:
        """Broadcast every replica's updated parameters to all others. Collective over the replicas."""
        for owner, tensors in enumerate(self._by_owner):
            broadcast(tensors, self._group, owner)


def broadcast(tensors: Sequence[Tensor], group: dist.ProcessGroup, source: int) -> None:
    """Overwrite `tensors` with those of worker `source` of the group, many per message. Collective."""
    if tensors:
        with torch.no_grad():
            _broadcast_coalesced(group, list(tensors), BUCKET_BYTES, source)
