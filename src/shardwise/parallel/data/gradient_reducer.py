"""Sum gradients: over replicas in buckets during the backward pass, over other groups after it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from weakref import WeakMethod

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.parallel.data.reducer import Flat, Pending, Reducer
from shardwise.splitting.buckets import bucket_bytes


class GradientReducer:
    """Sums the gradients of some parameters over the replicas, bucket by bucket as they become complete.

    A bucket's gradients become parts of one flat tensor, which is summed.

    Gradients become ready roughly in the reverse order of the parameters, so the buckets are in that order too.

    Args:
        parameters: the parameters whose gradients are summed, by name.
        reducer: reducer of their buckets.
        bucket: bucket size in MiB; 0 selects the default.
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], reducer: Reducer, bucket: int = 0) -> None:
        self._reducer = reducer
        self._buckets = _buckets(parameters.values(), bucket_bytes(bucket))
        names = {parameter: name for name, parameter in parameters.items()}
        self._flats = [
            Flat(tuple(names[p] for p in bucket), tuple(tuple(p.shape) for p in bucket)) for bucket in self._buckets
        ]
        self._missing: list[int] = []
        self._running: list[Pending] = []
        self._launched: set[int] = set()
        self._armed = False
        for index, members in enumerate(self._buckets):
            for parameter in members:
                parameter.register_post_accumulate_grad_hook(self._hook(index))  # type: ignore[no-untyped-call]

    def arm(self) -> None:
        """Start to count ready gradients.

        Call before the last backward pass of a step, whose gradients are final when they appear.
        """
        self._armed = True
        self._missing = [len(bucket) for bucket in self._buckets]
        self._launched.clear()

    def _hook(self, index: int) -> Callable[[Tensor], None]:
        """Return a gradient hook that holds only a weak reference to the reducer.

        Python cannot free a reference cycle through the hooks of a tensor, and would then never free the process group.
        """
        ready = WeakMethod(self._ready)

        def hook(_: Tensor) -> None:
            method = ready()
            if method is not None:
                method(index)

        return hook

    def _ready(self, index: int) -> None:
        if not self._armed:
            return
        self._missing[index] -= 1
        if self._missing[index] == 0:
            self._launch(index)

    def _launch(self, index: int) -> None:
        # zeros stand in for a missing gradient; the graph is the same on all replicas, so it is missing on all of them
        parameters = self._buckets[index]
        flat = _joined([p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters])
        for parameter, part in zip(parameters, torch.split(flat, [p.numel() for p in parameters]), strict=True):
            if parameter.grad is not None:
                parameter.grad = part.view_as(parameter)  # what it was before is free now
        self._running.append(self._reducer.all_reduce(flat, self._flats[index], mean=False))
        self._launched.add(index)

    def finish(self) -> None:
        """Reduce the remaining buckets and wait for all of them: the gradients are the sums then. Collective."""
        for index in range(len(self._buckets)):
            if index not in self._launched:
                self._launch(index)
        for pending in self._running:
            pending.wait()
        self._running.clear()
        self._launched.clear()
        self._armed = False


def _buckets(parameters: Iterable[nn.Parameter], limit: int) -> list[list[nn.Parameter]]:
    buckets: list[list[nn.Parameter]] = []
    size, dtype = 0, None
    for parameter in reversed(list(parameters)):
        bytes_ = parameter.numel() * parameter.element_size()
        if not buckets or size + bytes_ > limit or parameter.dtype != dtype:
            buckets.append([])
            size = 0
        buckets[-1].append(parameter)
        size, dtype = size + bytes_, parameter.dtype
    return buckets


def _joined(gradients: Sequence[Tensor]) -> Tensor:
    """Concatenate gradients into one 1-d tensor."""
    return torch.cat([gradient.reshape(-1) for gradient in gradients])


def _scatter(flat: Tensor, gradients: Sequence[Tensor]) -> None:
    """Write a flat 1-d sum back into the gradients."""
    for gradient, part in zip(gradients, torch.split(flat, [g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def sum_gradients(gradients: Sequence[Tensor], group: dist.ProcessGroup) -> None:
    """Sum tensors over a group in place, with one all-reduce per dtype. Collective."""
    for dtype in dict.fromkeys(gradient.dtype for gradient in gradients):
        chosen = [gradient for gradient in gradients if gradient.dtype == dtype]
        flat = _joined(chosen)
        dist.all_reduce(flat, group=group)
        _scatter(flat, chosen)
