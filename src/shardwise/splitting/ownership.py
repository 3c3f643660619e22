"""Assign whole tensors to owners: the worker that updates one under ZeRO-1, or writes it to a checkpoint."""

from __future__ import annotations

import heapq
from collections.abc import Mapping

BUCKET_BYTES = 64 * 2**20
"""Largest total size in bytes of the tensors that one broadcast message carries."""


def assign_owners(sizes: Mapping[str, int], workers: int) -> dict[str, int]:
    """Assign each name to a worker so that the workers' total sizes are about equal.

    Greedy: the largest tensor first, each to the worker with the smallest load so far.

    >>> assign_owners({"a": 4, "b": 3, "c": 2}, 2)
    {'a': 0, 'b': 1, 'c': 1}
    """
    loads = [(0, worker) for worker in range(workers)]  # a heap of (load, worker), least load first
    owners = {}
    for name in sorted(sizes, key=lambda name: (-sizes[name], name)):
        load, owner = loads[0]
        owners[name] = owner
        heapq.heapreplace(loads, (load + max(sizes[name], 1), owner))
    return owners
