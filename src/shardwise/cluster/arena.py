"""Memory that measured kernels find as training finds it: operands lie elsewhere in each call, results stay a while.

In a training step a kernel's first operand was written just before, its others long ago, and its results go where
nothing of it is in the caches. A kernel that is called again and again on the same tensors would be several times
faster.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from math import prod
from typing import Any

import torch
from torch import Tensor

KEPT_BYTES = 32 * 2**20
"""Of results that stay alive."""

ALIGNMENT = 64
"""Bytes of a cache line."""


class Arena:
    """Memory of one device, filled once.

    Args:
        device: of the tensors.
        size: bytes for each dtype; larger than the caches.
    """

    def __init__(self, device: torch.device, size: int = 64 * 2**20) -> None:
        self.device = device
        self._size = size
        self._pools: dict[torch.dtype, Tensor] = {}
        self._next: dict[torch.dtype, int] = {}
        self._kept: deque[tuple[int, Any]] = deque()
        self._kept_bytes = 0

    def take(self, *shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
        """A tensor with normal random values, elsewhere than the ones before."""
        pool, count = self._pool(dtype, prod(shape)), prod(shape)
        start = self._next[dtype]
        if start + count > pool.numel():
            start = 0
        step = ALIGNMENT // dtype.itemsize
        self._next[dtype] = start + -(-count // step) * step
        return pool[start : start + count].view(shape)

    def integers(self, *shape: int, below: int) -> Tensor:
        """A new tensor of whole numbers from 0 to `below` - 1."""
        return torch.randint(below, shape, device=self.device)

    def keep(self, results: Any) -> None:
        """Keeps what a call returned until as much has been returned after it."""
        size = sum(result.untyped_storage().nbytes() for result in _tensors(results))
        self._kept.append((size, results))
        self._kept_bytes += size
        while self._kept_bytes > KEPT_BYTES and len(self._kept) > 1:
            self._kept_bytes -= self._kept.popleft()[0]

    def clear(self) -> None:
        """Frees the results."""
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
