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

`enter` and `gather_enter` can start their collective in the backward pass without waiting for it; the value that they
are given then comes from `awaited`, which waits. What autograd computes between the two runs beside the collective, see
`overlap`. What `gather_enter` gathers, the backward pass can gather again instead of saving it (`Regathered`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

Segments = tuple[int, ...]


@dataclass(slots=True)
class Started:
    """Collective that a backward pass has started and waits for later.

    Attributes:
        work: its handle; None if none is under way.
        parts: what it reads, which lives as long as it runs.
    """

    work: Any = None
    parts: list[Tensor] | None = None

    def wait(self, gradient: Tensor) -> Tensor:
        """Wait for the collective, and return the gradient that it computes."""
        work, self.work = self.work, None
        if work is not None:
            work.wait()
        self.parts = None
        return gradient


@dataclass(slots=True)
class Regathered:
    """Gathered value that is not saved: the backward pass gathers it again for the gradients of weights that took it.

    Attributes:
        begin: starts to gather it from this worker's part; returns a function that waits for it and returns it.
        layers: number of layers that have not taken it yet.
    """

    begin: Callable[[Tensor], Callable[[], Tensor]]
    layers: int = 0
    _wait: Callable[[], Tensor] | None = None
    _value: Tensor | None = None

    def start(self, part: Tensor) -> None:
        """Start to gather the value from this worker's part of it, at the first call."""
        if self._wait is None:
            self._wait = self.begin(part)

    def take(self) -> Tensor:
        """Return the value for one of its layers. Waits for it at the first call, and forgets it at the last."""
        if self._wait is not None:
            self._value, self._wait = self._wait(), None
        assert self._value is not None
        value = self._value
        self.layers -= 1
        if not self.layers:
            self._value = None
        return value


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

    def awaited(self, x: Tensor) -> Tensor:
        """Return the value unchanged; its gradient waits for the collective that the exchange after it started."""
        started = Started()
        seen: Any = _mirrored(x, _same, started.wait)
        seen.started = started
        return seen  # type: ignore[no-any-return]

    def enter_unawaited(self, x: Tensor, fresh: bool) -> Tensor:
        """Do as `enter`, with a result of `awaited`, which waits for the all-reduce.

        `fresh` says that nothing else reads the gradient: it is then summed in place.
        """
        started: Started = x.started  # type: ignore[attr-defined]

        def summed(gradient: Tensor) -> Tensor:
            own = fresh and gradient.is_contiguous()
            total = gradient if own else gradient.clone(memory_format=torch.contiguous_format)
            started.work = self._all_reduce(total, dist.ReduceOp.SUM, later=True)
            return total

        return _mirrored(x, _same, summed)

    def gather_enter_unawaited(self, x: Tensor, dim: int, spans: Segments, again: bool) -> Tensor:
        """Do as `gather_enter`, with a result of `awaited`, which waits for the reduce-scatter.

        `again` says that the layers which take the value save this worker's part of it, and gather it again.
        """
        started: Started = x.started  # type: ignore[attr-defined]

        def scattered(gradient: Tensor, dim: int, spans: Segments) -> Tensor:
            output, started.parts = self._cut_for_all(gradient, dim, spans)
            started.work = self._reduce_scatter(output, started.parts, later=True)
            return output

        whole: Any = _mirrored(x, self.joined, scattered, dim, spans)
        if again:
            whole.part = x.detach()
            whole.regathered = Regathered(lambda part: self._join(part, dim, spans, later=True))
        return whole  # type: ignore[no-any-return]

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
        return self._join(x, dim, spans, later=False)()

    def _join(self, x: Tensor, dim: int, spans: Segments, *, later: bool) -> Callable[[], Tensor]:
        """All-gather the workers' parts along `dim`, and return a function that puts them in place.

        Parts that lie one after another in the whole value, such as those of the sequence of a single sample, are
        received in place. With `later` that function waits for the all-gather.
        """
        x = x.contiguous()
        whole = None
        if len(spans) == 1 and math.prod(x.shape[:dim]) == 1:
            whole = x.new_empty((*x.shape[:dim], *spans, *x.shape[dim + 1 :]))
        parts = [torch.empty_like(x) for _ in range(self.ranks)] if whole is None else [*whole.chunk(self.ranks, dim)]
        work = self._all_gather(parts, x, later=later)

        def joined() -> Tensor:
            if later:
                work.wait()
            if whole is not None:
                return whole
            if len(spans) == 1:
                return torch.cat(parts, dim)
            sizes = [size // self.ranks for size in spans]
            pieces = [torch.split(part, sizes, dim) for part in parts]
            return torch.cat([pieces[r][s] for s in range(len(sizes)) for r in range(self.ranks)], dim)

        return joined

    def scattered(self, x: Tensor, dim: int, spans: Segments) -> Tensor:
        """Reduce-scatter along `dim`, without autograd."""
        output, parts = self._cut_for_all(x, dim, spans)
        self._reduce_scatter(output, parts)
        return output

    def _cut_for_all(self, x: Tensor, dim: int, spans: Segments) -> tuple[Tensor, list[Tensor]]:
        """Return an empty part of `x` along `dim`, and the parts of all workers."""
        parts = [Exchange(None, r, self.ranks).cut(x, dim, spans).contiguous() for r in range(self.ranks)]
        return torch.empty_like(parts[0]), parts

    def _all_reduce(self, total: Tensor, op: Any, *, later: bool = False) -> Any:
        """All-reduce in place. With `later` return a handle to wait for it."""
        return dist.all_reduce(total, op=op, group=self.group, async_op=later)

    def _all_gather(self, parts: list[Tensor], x: Tensor, *, later: bool = False) -> Any:
        """All-gather into `parts`. With `later` return a handle to wait for it."""
        return dist.all_gather(parts, x, group=self.group, async_op=later)

    def _reduce_scatter(self, output: Tensor, parts: list[Tensor], *, later: bool = False) -> Any:
        """Reduce-scatter into `output`. With `later` return a handle to wait for it."""
        return dist.reduce_scatter(output, parts, group=self.group, async_op=later)


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
