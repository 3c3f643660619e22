"""Memory for kernel measurements that reproduces the cache state of a training step.

In a training step, a kernel's first operand was written just before, its other operands were written long ago, and its
results go to memory that is not in any cache. A kernel that is called repeatedly on the same tensors would be several
times faster. The arena therefore places operands at new addresses in each call and keeps results alive for a while.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 32 * 2**20
"""Total bytes of results that the arena keeps alive."""

ALIGNMENT = 64
"""Bytes in a cache line."""

POOL_BYTES, GPU_POOL_BYTES = 64 * 2**20, 2**30
"""Bytes of the pool of each dtype on a CPU and on a GPU: several times the caches."""


class Arena:
    """Pool of random values on one device, from which measured kernels take their operands.

    Args:
        device: device of the tensors.
        size: bytes of the pool of each dtype; 0 selects a size that is larger than the caches.
    """

    def __init__(self, device: torch.device, size: int = 0) -> None:
        self.device = device
        self._size = size or (GPU_POOL_BYTES if device.type == "cuda" else POOL_BYTES)
        self._pools: dict[torch.dtype, Tensor] = {}
        self._next: dict[torch.dtype, int] = {}
        self._kept: deque[tuple[int, Any]] = deque()
        self._kept_bytes = 0

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """Return a tensor of normally distributed values that does not overlap recently taken ones."""
        pool, count = self._pool(dtype, prod(shape)), prod(shape)
        start = self._next[dtype]
        if start + count > pool.numel():
            start = 0
        step = ALIGNMENT // dtype.itemsize
        self._next[dtype] = start + -(-count // step) * step
        return pool[start : start + count].view(shape)

    def integers(self, *shape: int, below: int) -> Tensor:
        """Return a new tensor of random integers from 0 to `below` - 1."""
        return torch.randint(below, shape, device=self.device)

    def keep(self, results: Any) -> None:
        """Keep the results of a call alive until `KEPT_BYTES` of newer results have been kept."""
        size = sum(result.untyped_storage().nbytes() for result in _tensors(results))
        self._kept.append((size, results))
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popleft()[0]

    def clear(self) -> None:
        """Free the results that were kept alive."""
        self._kept.clear()
        self._kept_bytes = 0

    def _pool(self, dtype: torch.dtype, count: int) -> Tensor:
        needed = max(count, self._size // dtype.itemsize)
        pool = self._pools.get(dtype)
        if pool is None or pool.numel() < needed:
            pool = self._pools[dtype] = torch.randn(needed, device=self.device).to(dtype)
            self._next[dtype] = 0
        return pool


def _tensors(results: Any) -> Iterator[Tensor]:
    if isinstance(results, Tensor):
        yield results
    elif isinstance(results, (list, tuple)):
        for each in results:
            yield from _tensors(each)
