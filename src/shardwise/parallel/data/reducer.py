"""Reducers: they join flat gradients of replicas. `joining` says which of them a strategy uses for which gradients.

A reducer joins the gradients of its group, and scales them to be those of all replicas: their mean where the loss was
multiplied by the number of replicas (DDP, `fully_shard`), else their sum. So a reducer of a smaller group, or of no
group, gives a gradient that takes part in training as that of all replicas does.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import ceil, prod
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

reduce_scatter_flat: Any = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)
all_gather_flat: Any = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""Collectives of one flat tensor: torch renamed them, and warns where the old names are called."""


@dataclass(frozen=True)
class Flat:
    """Contents of a flat 1-d gradient: gradients of parameters one after another.

    Attributes:
        names: names of the parameters.
        shapes: shapes of their gradients.
        ranks: number of workers between which `fully_shard` scatters it; 0: it stays whole. A scattered one begins
            with the rows of all gradients that the first worker gets, padded with zeros to equally many on each.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    ranks: int = 0

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Return the elements of each gradient in one worker's part, with padding; if it stays whole, in all of it."""
        if not self.ranks:
            return tuple(map(prod, self.shapes))
        return tuple(ceil(shape[0] / self.ranks) * prod(shape[1:]) for shape in self.shapes)

    def split(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the gradients by name, in their shapes: views of a whole `flat`, copies of a scattered one."""
        parts = torch.split(flat.view(max(self.ranks, 1), -1), list(self.sizes), dim=1)
        named = zip(self.names, self.shapes, parts, strict=True)
        if not self.ranks:
            return {name: part.view(shape) for name, shape, part in named}
        return {name: part.reshape(-1)[: prod(shape)].reshape(shape) for name, shape, part in named}

    def only(self, names: Container[str]) -> Flat:
        """Return the contents without the parameters that are not in `names`."""
        kept = [(n, s) for n, s in zip(self.names, self.shapes, strict=True) if n in names]
        return Flat(tuple(n for n, _ in kept), tuple(s for _, s in kept), self.ranks)

    def take(self, flat: Tensor, some: Flat) -> Tensor:
        """Return the flat gradient of `some` of the parameters, as a copy; also of one worker's part."""
        parts = self._columns(flat)
        return torch.cat([parts[name] for name in some.names], dim=1).view(-1)

    def put(self, flat: Tensor, some: Flat, given: Tensor) -> None:
        """Write the flat gradient of `some` parameters to its place in that of all, or in a part of it."""
        parts = self._columns(flat)
        for name, part in some._columns(given).items():
            parts[name].copy_(part)

    def _columns(self, flat: Tensor) -> dict[str, Tensor]:
        """Return the parts of a flat gradient by name, with a row for each worker's part in it."""
        parts = torch.split(flat.view(-1, sum(self.sizes)), list(self.sizes), dim=1)
        return dict(zip(self.names, parts, strict=True))

    def join(self, gradients: Mapping[str, Tensor], like: Tensor) -> Tensor:
        """Return the flat tensor of some gradients, zeros for those left out, with dtype and device of `like`."""
        flat = like.new_zeros(max(self.ranks, 1), sum(self.sizes))
        parts = torch.split(flat, list(self.sizes), dim=1)
        for name, part in zip(self.names, parts, strict=True):
            if name in gradients and not self.ranks:
                part.copy_(gradients[name].reshape(1, -1))
            elif name in gradients:
                rows = torch.zeros(part.numel(), dtype=flat.dtype, device=flat.device)
                rows[: gradients[name].numel()] = gradients[name].reshape(-1)
                part.copy_(rows.view_as(part))
        return flat.view(-1)


class Pending(Protocol):
    """A reduction in progress."""

    def wait(self) -> None:
        """Wait until the flat gradient is the joined one. On a GPU the current stream waits."""
        ...

    def future(self, flat: Tensor) -> torch.futures.Future[Tensor] | None:
        """Return a future of `flat` after the reduction; None if only `wait` completes it."""
        ...


class Reducer(Protocol):
    """Joins flat gradients of replicas. All workers of its group call it with the same gradients in the same order.

    Attributes:
        native: whether torch's own collectives in `dtype` give the same: DDP and `fully_shard` need not call it then.
        dtype: dtype in which gradients are sent and summed; None: their own.
    """

    native: bool
    dtype: torch.dtype | None

    def all_reduce(self, flat: Tensor, what: Flat, *, mean: bool) -> Pending:
        """Start to join whole gradients in place, to their mean or their sum."""
        ...

    def reduce_scatter(self, output: Tensor, flat: Tensor, what: Flat) -> None:
        """Write this worker's part of the mean of scattered gradients to `output`."""
        ...


class SentReduction:
    """Reduction by one collective, with what follows it."""

    def __init__(self, work: Any, after: Callable[[], object] | None = None) -> None:
        self._work, self._after = work, after

    def wait(self) -> None:
        """Wait for the collective, and do what follows it."""
        self._work.wait()
        if self._after is not None:
            self._after()

    def future(self, flat: Tensor) -> torch.futures.Future[Tensor] | None:
        """Return the future of the collective and of what follows it."""

        def then(_: Any) -> Tensor:
            if self._after is not None:
                self._after()
            return flat

        done: torch.futures.Future[Tensor] = self._work.get_future().then(then)
        return done


class DoneReduction:
    """Reduction that was over when it began."""

    def wait(self) -> None:
        """Do nothing."""

    def future(self, flat: Tensor) -> torch.futures.Future[Tensor] | None:
        """Return a future that is there."""
        done: torch.futures.Future[Tensor] = torch.futures.Future(devices=[flat.device] if flat.is_cuda else [])
        done.set_result(flat)
        return done


class ExactReducer:
    """Reducer by torch's own collectives, in the dtype of the gradients or in a narrower one.

    Args:
        group: the workers whose gradients join.
        replicas: number of all replicas, see the module's docstring.
        dtype: dtype in which gradients are sent and summed; None: their own.
    """

    def __init__(self, group: dist.ProcessGroup, replicas: int, dtype: torch.dtype | None = None) -> None:
        self._group, self._size, self.dtype = group, dist.get_world_size(group), dtype
        self._factor = replicas / self._size
        self.native = self._size == replicas

    def all_reduce(self, flat: Tensor, what: Flat, *, mean: bool) -> Pending:
        """Start to join whole gradients, see `Reducer.all_reduce`."""
        sent = flat if self.dtype is None or not flat.is_floating_point() else flat.to(self.dtype)
        if mean:
            sent.div_(self._size)
        work = dist.all_reduce(sent, group=self._group, async_op=True)
        factor = 1.0 if mean else self._factor
        if sent is flat and factor == 1:
            return SentReduction(work)
        return SentReduction(work, lambda: flat.copy_(sent) if factor == 1 else torch.mul(sent, factor, out=flat))

    def reduce_scatter(self, output: Tensor, flat: Tensor, what: Flat) -> None:
        """Join scattered gradients, see `Reducer.reduce_scatter`."""
        reduce_scatter_flat(output, flat, op=dist.ReduceOp.AVG, group=self._group)


class OwnGradients:
    """Reducer that joins nothing: each replica keeps its own gradients, as if all had the same.

    Args:
        replicas: number of all replicas.
        handed: called with each flat gradient once it is complete; may keep a reference to it.
    """

    native = False
    dtype: torch.dtype | None = None

    def __init__(self, replicas: int, handed: Callable[[Tensor, Flat], object] | None = None) -> None:
        self._replicas, self._handed = replicas, handed

    def all_reduce(self, flat: Tensor, what: Flat, *, mean: bool) -> Pending:
        """Scale whole gradients to those of all replicas, and hand them on."""
        if not mean:
            flat.mul_(self._replicas)
        if self._handed is not None:
            self._handed(flat, what)
        return DoneReduction()

    def reduce_scatter(self, output: Tensor, flat: Tensor, what: Flat) -> None:
        """Raise AssertionError: workers that split parameters need each other's gradients."""
        raise AssertionError("gradients of split parameters are always joined over fsdp")


def joined(reducer: Reducer, gradients: Mapping[str, Tensor]) -> None:
    """Replace gradients by their sums over the replicas, with one reduction per dtype. Collective."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients.values()):
        chosen = {name: gradient for name, gradient in gradients.items() if gradient.dtype == dtype}
        flat = torch.cat([gradient.reshape(-1) for gradient in chosen.values()])
        what = Flat(tuple(chosen), tuple(tuple(gradient.shape) for gradient in chosen.values()))
        reducer.all_reduce(flat, what, mean=False).wait()
        for name, part in what.split(flat).items():
            chosen[name].copy_(part)
