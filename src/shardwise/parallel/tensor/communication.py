"""Communication among tensor-parallel workers, in the forward and in the backward pass.

The gradient of a replicated value is replicated, of a sharded value sharded, of a partial value replicated. So every
exchange has a mirror image in the backward pass (the f and g of Megatron-LM; Shoeybi et al. 2019, section 3):

    exchange         forward                        backward
    enter            -                              all-reduce     a replicated value enters sharded work
    divide           -                              divide         a gradient that all have, to be summed later
    reduce           all-reduce                     -              a partial value becomes replicated
    gather           all-gather                     slice          a sharded value becomes replicated
    slice            slice                          all-gather     a replicated value becomes sharded
    gather_enter     all-gather                     reduce-scatter gather, then enter
    reduce_scatter   reduce-scatter                 all-gather     a partial value becomes sharded
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Segments = tuple[int, ...]


class Exchange:
    """Exchanges among the workers of one tensor-parallel group.

    Attributes:
        group: the workers; None only if nothing is executed.
        rank: this worker's rank in the group.
        ranks: number of workers in the group.
    """

    def __init__(self, group: dist.ProcessGroup | None, rank: int, ranks: int) -> None:
        self.group = group
        self.rank = rank
        self.ranks = ranks

    def enter(self, x: Tensor) -> Tensor:
        """Return the value unchanged; its gradient is all-reduced."""
        return _mirrored(x, _same, self.summed)

    def divide(self, x: Tensor) -> Tensor:
        """Return the value unchanged; its gradient is divided by the number of workers.

        All of them have the whole gradient.
        """
        return _mirrored(x, _same, lambda gradient: gradient / self.ranks)

    def reduce(self, x: Tensor) -> Tensor:
        """Sum a value over the workers; the gradient passes unchanged."""
        return _mirrored(x, self.summed, lambda gradient: gradient)

    def gather(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """All-gather a value that is sharded along `dim`; the gradient is sliced."""
        return _mirrored(x, self.joined, self.cut, dim, spans)

    def slice(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """Return this worker's part along `dim`; the gradient is all-gathered."""
        return _mirrored(x, self.cut, self.joined, dim, spans)

    def gather_enter(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """All-gather a value that is sharded along `dim`; the gradient is reduce-scattered."""
        return _mirrored(x, self.joined, self.scattered, dim, spans)

    def reduce_scatter(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """Reduce-scatter a value along `dim`; the gradient is all-gathered."""
        return _mirrored(x, self.scattered, self.joined, dim, spans)

    def summed(self, x: Tensor, op: Any = dist.ReduceOp.SUM) -> Tensor:
        """All-reduce into a new tensor, without autograd."""
        total = x.clone(memory_format=torch.contiguous_format)
        self._all_reduce(total, op)
        return total

    def cut(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """Return this worker's part along `dim`, without autograd: its piece of every span."""
        if len(spans) == 1:
            part = spans[0] // self.ranks
            return x.narrow(dim, self.rank * part, part)
        pieces, start = [], 0
        for size in spans:
            part = size // self.ranks
            pieces.append(x.narrow(dim, start + self.rank * part, part))
            start += size
        return torch.cat(pieces, dim)

    def joined(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """All-gather the workers' parts along `dim` and put them in place, without autograd."""
        x = x.contiguous()
        parts = [torch.empty_like(x) for _ in range(self.ranks)]
        self._all_gather(parts, x)
        if len(spans) == 1:
            return torch.cat(parts, dim)
        sizes = [size // self.ranks for size in spans]
        pieces = [torch.split(part, sizes, dim) for part in parts]
        return torch.cat([pieces[r][s] for s in range(len(sizes)) for r in range(self.ranks)], dim)

    def scattered(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """Reduce-scatter along `dim`, without autograd."""
        parts = [Exchange(None, r, self.ranks).cut(x, dim, spans).contiguous() for r in range(self.ranks)]
        output = torch.empty_like(parts[0])
        self._reduce_scatter(output, parts)
        return output

    def _all_reduce(self, total: Tensor, op: Any) -> None:
        dist.all_reduce(total, op=op, group=self.group)

    def _all_gather(self, parts: list[Tensor], x: Tensor) -> None:
        dist.all_gather(parts, x, group=self.group)

    def _reduce_scatter(self, output: Tensor, parts: list[Tensor]) -> None:
        dist.reduce_scatter(output, parts, group=self.group)


def _same(x: Tensor) -> Tensor:
    return x.view_as(x)


def _mirrored(x: Tensor, there: Callable[..., Tensor], back: Callable[..., Tensor], *where: Any) -> Tensor:
    """Compute `there(x, *where)`, with `back(gradient, *where)` as its backward."""
    output: Tensor = _Mirrored.apply(x, there, back, where)  # type: ignore[no-untyped-call]
    return output


class _Mirrored(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, there: Callable[..., Tensor], back: Callable[..., Tensor], where: tuple[Any, ...]
    ) -> Tensor:
        ctx.back, ctx.where = back, where
        return there(x, *where)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.back(gradients[0], *ctx.where), None, None, None
