"""The operations of a plain module that depend on who computes what: dropout, batch normalisation, recomputation.

They are replaced on the modules of torch that do them (`nn.Dropout`, `nn.BatchNorm2d`, `nn.MultiheadAttention`, ...),
by a `forward` on the instance: classes and state-dict names stay. What a model calls as a function (`F.dropout`, say)
is caught by a torch function mode. That costs about a microsecond per operation, so it is on in the first training pass
and stays on only if it caught something. Dropout that a model starts later is noticed by torch's random state moving;
from the next pass on it is caught too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from shardwise.parallel import selective
from shardwise.parallel.batchnorm import batch_norm
from shardwise.parallel.dropout import KeyedDropout
from shardwise.parallel.engine import Position
from shardwise.parallel.values import facts

Handlers = dict[Callable[..., Any], Callable[..., Any]]

_DROPOUTS: Handlers = {
    nn.Dropout.forward: F.dropout,
    nn.Dropout1d.forward: F.dropout1d,
    nn.Dropout2d.forward: F.dropout2d,
    nn.Dropout3d.forward: F.dropout3d,
    nn.AlphaDropout.forward: F.alpha_dropout,
    nn.FeatureAlphaDropout.forward: F.feature_alpha_dropout,
}
"""A module's forward -> the function that it calls."""


DRAWN = "the model draws random numbers outside of dropout: these differ from those of one worker"


class Operations:
    """Replaces the operations of one model.

    Args:
        position: where the training is; the engine keeps it up to date.
        device: where the model computes.
        make_group: the replicas that a batch is split over, in a process group that nothing else uses (the order of
            its collectives must not depend on when a gradient bucket happens to be ready), made at the first batch
            norm on all of them; None: one replica.
        recompute: whether blocks are computed again, see `recompute`.

    Attributes:
        draws_unkeyed: whether the model draws random numbers that are not dropout's.
        recomputing: whether a block is computed again.
    """

    def __init__(
        self,
        position: Position,
        device: torch.device,
        make_group: Callable[[], dist.ProcessGroup] | None = None,
        *,
        recompute: bool = False,
    ) -> None:
        self.draws_unkeyed = False
        self._position = position
        self._make_group = make_group
        self._device = device
        self._keyed = KeyedDropout(position)
        self._handlers: Handlers = {**self._keyed.handlers, F.batch_norm: self._batch_norm}
        self.recomputing = False
        self._everywhere: bool | None = None
        """Whether the mode is on in all of a pass; None before the first one, which tells."""
        self._caught = False
        self._replaced = 0
        self._own_normalisation = make_group is not None or recompute

    def install(self, model: nn.Module) -> None:
        """Replaces the forward of the modules of `model` that do such an operation."""
        for module in model.modules():
            forward = self._replacement(module)
            if forward is not None:
                module.forward = forward

    def recompute(self, block: nn.Module, *, products: bool = False) -> None:
        """Makes `block` drop its activations and compute them again in the backward pass, drawing the same dropout.

        `products`: it keeps the results of its products, see `selective`.
        """
        original = block.forward
        contexts = self._selective_contexts if products else self._contexts

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return checkpoint(original, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        block.forward = forward

    def drawn(self) -> int:
        """How many calls have drawn dropout in this pass."""
        return self._keyed.site

    @contextmanager
    def drawing_from(self, site: int, position: Position) -> Iterator[None]:
        """Surrounds a part of a pass at `position` that begins when `site` calls have drawn dropout."""
        self._position = self._keyed.position = position
        self._keyed.site = site
        before = self._random_state()
        with self._mode():
            yield
        self.draws_unkeyed |= not _same(before, self._random_state())

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """Surrounds each forward pass in training."""
        self._keyed.site = 0
        before = self._random_state()
        with self._mode() if self._everywhere is not False else nullcontext():
            yield
        moved = not _same(before, self._random_state())
        if self._everywhere is None:
            self._everywhere = self._caught
        elif moved and not self._everywhere:
            self._everywhere = True
            moved = False  # by dropout, perhaps: the next pass tells
        self.draws_unkeyed |= moved

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self._make_group is None else self._make_group()

    def _random_state(self) -> Any:
        """What moves when torch draws on our device. On a GPU a counter that the CPU keeps: nothing waits."""
        if self._device.type == "cuda":
            return torch.cuda.default_generators[self._device.index or 0].get_offset()
        return torch.get_rng_state()

    def _mode(self) -> _Handled:
        return _Handled(self._handlers, self._watch)

    def _watch(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Calls the handler of `function`; notes when that made a difference."""
        before = self._keyed.site + self._replaced
        output = self._handlers[function](*args, **kwargs)
        self._caught |= self._keyed.site + self._replaced != before
        return output

    def _replacement(self, module: Any) -> Callable[..., Any] | None:
        """Our forward for `module`; None where its class has a forward of its own."""
        forward = type(module).forward
        if forward in _DROPOUTS:
            return self._dropout(module, _DROPOUTS[forward])
        if forward is nn.SyncBatchNorm.forward or (self._own_normalisation and forward is _BatchNorm.forward):
            return self._normalisation(module)
        if forward is nn.MultiheadAttention.forward and module.dropout > 0:
            return self._attention(module)
        return None

    def _dropout(self, module: Any, function: Callable[..., Any]) -> Callable[[Tensor], Tensor]:
        handler = self._handlers[function]
        in_place = module.inplace and function not in (F.alpha_dropout, F.feature_alpha_dropout)

        def forward(input: Tensor) -> Tensor:  # noqa: A002
            output: Tensor = handler(input, module.p, module.training, in_place)
            return output

        return forward

    def _attention(self, module: nn.MultiheadAttention) -> Callable[..., Any]:
        original = module.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            with _Handled(self._keyed.handlers) if module.training else nullcontext():
                return original(*args, **kwargs)

        return forward

    def _normalisation(self, module: Any) -> Callable[[Tensor], Tensor]:
        """`_BatchNorm.forward`, with the statistics of all replicas and no second update when it is recomputed."""

        def forward(input: Tensor) -> Tensor:  # noqa: A002
            if isinstance(module, nn.SyncBatchNorm):
                module._check_non_zero_input_channels(input)
            else:
                module._check_input_dim(input)
            tracked = module.training and module.track_running_stats
            momentum = 0.0 if module.momentum is None else module.momentum
            if tracked and module.num_batches_tracked is not None and not self.recomputing:
                module.num_batches_tracked.add_(1)
                if module.momentum is None:  # a cumulative average
                    momentum = 1.0 / float(module.num_batches_tracked)
            mean, var = module.running_mean, module.running_var
            own = module.training or (mean is None and var is None)
            if module.training and not module.track_running_stats:
                mean = var = None
            return self._batch_norm(input, mean, var, module.weight, module.bias, own, momentum, module.eps)

        return forward

    def _batch_norm(
        self,
        input: Tensor,  # noqa: A002
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        training: bool = False,
        momentum: float = 0.1,
        eps: float = 1e-5,
    ) -> Tensor:
        """`torch.nn.functional.batch_norm`; `training` says whether the batch's own statistics are used."""
        if not training or not self._own_normalisation:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        self._replaced += 1
        if self.recomputing:  # they have been updated; copies, for what is saved must be as many tensors as before
            running_mean = None if running_mean is None else running_mean.clone()
            running_var = None if running_var is None else running_var.clone()
        if self._group is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        counted = self._position.counted > 0
        return batch_norm(input, weight, bias, running_mean, running_var, momentum, eps, self._group, counted)

    def _contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """What surrounds a block's forward, and its recomputation."""
        return nullcontext(), self._again(self._keyed.site)

    def _selective_contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The same for a block that keeps the results of its products."""
        forward, again = selective.contexts()
        return forward, _both(self._again(self._keyed.site), again)

    @contextmanager
    def _again(self, site: int) -> Iterator[None]:
        """Draws from `site` on what was drawn there before. The backward pass may run in another thread."""
        later, self._keyed.site, self.recomputing = self._keyed.site, site, True
        try:
            with self._mode() if self._everywhere is not False else nullcontext():
                yield
        finally:
            self._keyed.site, self.recomputing = later, False


@contextmanager
def _both(outer: AbstractContextManager[None], inner: AbstractContextManager[None]) -> Iterator[None]:
    with outer, inner:
        yield


def _same(before: Any, after: Any) -> bool:
    """Whether two random states are one."""
    if isinstance(before, int):
        return bool(before == after)
    with facts():
        return torch.equal(before, after)


class _Handled(TorchFunctionMode):
    """Calls `watch`, or else the handler itself, instead of every torch function that has a handler."""

    def __init__(
        self,
        handlers: Handlers,
        watch: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None = None,
    ) -> None:
        super().__init__()
        self._handlers = handlers
        self._watch = watch

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        handler = self._handlers.get(func)
        if handler is None:
            return func(*args, **(kwargs or {}))
        if self._watch is not None:
            return self._watch(func, args, kwargs or {})
        return handler(*args, **(kwargs or {}))
