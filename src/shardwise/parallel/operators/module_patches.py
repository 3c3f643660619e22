"""Operations of a plain module that depend on who computes what: dropout, batch normalisation, recomputation.

They are replaced on torch's own modules (`nn.Dropout`, `nn.BatchNorm2d`, `nn.MultiheadAttention`, ...) by a `forward`
on the instance, so classes and state-dict names are unchanged. A function that a model calls (`F.dropout`, say) is
intercepted by a torch function mode. The mode costs about a microsecond per operation, so it is on in the first
training pass and stays on only if it intercepted something. If a model starts to use dropout later, torch's random
state moves; from the next pass on the mode is on again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.overrides import TorchFunctionMode
from torch.utils.checkpoint import checkpoint

from shardwise.parallel.engine import Position
from shardwise.parallel.operators import selective_checkpoint
from shardwise.parallel.operators.batch_norm import batch_norm
from shardwise.parallel.operators.dropout import DropoutReplacements
from shardwise.parallel.operators.random_numbers import replacements
from shardwise.parallel.operators.true_gradients import scale_module_hooks, true_gradients
from shardwise.workload.pytree import facts
from shardwise.workload.trace.python_state import PythonState

Handlers = dict[Callable[..., Any], Callable[..., Any]]

_DROPOUTS: Handlers = {
    nn.Dropout.forward: F.dropout,
    nn.Dropout1d.forward: F.dropout1d,
    nn.Dropout2d.forward: F.dropout2d,
    nn.Dropout3d.forward: F.dropout3d,
    nn.AlphaDropout.forward: F.alpha_dropout,
    nn.FeatureAlphaDropout.forward: F.feature_alpha_dropout,
}
"""The forward of each dropout module -> the function that it calls."""


DRAWN = "the model draws random numbers of a kind that workers do not share: these differ from those of one worker"


class ModulePatches:
    """Replacements for the operations of one model that depend on who computes what.

    Args:
        position: the position in the training; the engine keeps it up to date.
        device: the device that the model computes on.
        make_group: creates the process group of the replicas that share a batch. Nothing else may use that group,
            because the order of its collectives must not depend on when a gradient bucket is ready. Called at the first
            batch norm on all replicas. None: one replica.
        recompute: whether blocks are recomputed, see `recompute`.
        gradient_factor: size of the gradients of a backward pass in proportion to the true ones.

    Attributes:
        draws_other_random_numbers: whether the model draws random numbers that workers do not share.
        recomputing: whether a block is being recomputed.
    """

    def __init__(
        self,
        position: Position,
        device: torch.device,
        make_group: Callable[[], dist.ProcessGroup] | None = None,
        *,
        recompute: bool = False,
        gradient_factor: float = 1,
    ) -> None:
        self._factor = gradient_factor
        self.draws_other_random_numbers = False
        self._position = position
        self._make_group = make_group
        self._device = device
        self._dropout_replacements = DropoutReplacements(position)
        self._handlers: Handlers = {
            **self._dropout_replacements.handlers,
            **replacements(self._dropout_replacements),
            F.batch_norm: self._batch_norm,
        }
        self.recomputing = False
        self._everywhere: dict[str, bool] = {}
        """Part of a pass, `forward` or `loss` -> whether the mode is on there; not there before the first pass, which
        decides."""
        self._caught = False
        self._replaced = 0
        self._own_normalisation = make_group is not None or recompute

    def install(self, model: nn.Module) -> None:
        """Replace the forward of the modules of `model` that perform such an operation."""
        for module in model.modules():
            forward = self._replacement(module)
            if forward is not None:
                module.forward = forward
        scale_module_hooks(model, self._factor)

    def recompute(self, block: nn.Module, *, products: bool = False) -> None:
        """Make `block` drop its activations and recompute them in the backward pass, with the same dropout masks.

        Values in Python that its forward changes are for the recomputation as they were for the forward.

        If `products` is set, it saves the results of its matmuls, convolutions and attention, see
        `selective_checkpoint`.
        """
        original = block.forward
        contexts = partial(self._selective_contexts if products else self._contexts, cache(lambda: PythonState(block)))

        def forward(*args: Any, **kwargs: Any) -> Any:
            if not torch.is_grad_enabled():
                return original(*args, **kwargs)
            return checkpoint(original, *args, use_reentrant=False, context_fn=contexts, **kwargs)

        block.forward = forward

    def drawn(self) -> int:
        """Return the number of calls that have drawn dropout in this pass."""
        return self._dropout_replacements.site

    @contextmanager
    def drawing_from(self, site: int, position: Position) -> Iterator[None]:
        """Intercept operations inside the block, which is a part of a pass at `position`.

        `site` calls have drawn dropout in that pass before.
        """
        self._position = self._dropout_replacements.position = position
        self._dropout_replacements.site = site
        before = self._random_state()
        with self._mode(), true_gradients(self._factor):
            yield
        self.draws_other_random_numbers |= not _same(before, self._random_state())

    @contextmanager
    def training_pass(self) -> Iterator[None]:
        """Intercept operations inside the block, a forward pass in training."""
        self._dropout_replacements.site = 0
        with self._part("forward"), true_gradients(self._factor):
            yield

    @contextmanager
    def training_loss(self) -> Iterator[None]:
        """Intercept operations inside the block, the loss that follows a forward pass in training."""
        with self._part("loss"):
            yield

    @contextmanager
    def _part(self, part: str) -> Iterator[None]:
        """Intercept operations inside the block, a part of a pass."""
        before, self._caught = self._random_state(), False
        with self._mode() if self._everywhere.get(part, True) else nullcontext():
            yield
        moved = not _same(before, self._random_state())
        if part not in self._everywhere:
            self._everywhere[part] = self._caught
        elif moved and not self._everywhere[part]:
            self._everywhere[part] = True
            moved = False  # perhaps dropout: the next pass tells
        self.draws_other_random_numbers |= moved

    @cached_property
    def _group(self) -> dist.ProcessGroup | None:
        return None if self._make_group is None else self._make_group()

    def _random_state(self) -> Any:
        """Return what changes when torch draws random numbers on our device.

        On a GPU this is a counter on the CPU side, so reading it does not synchronize.
        """
        if self._device.type == "cuda":
            return torch.cuda.default_generators[self._device.index or 0].get_offset()
        return torch.get_rng_state()

    def _mode(self) -> _Handled:
        return _Handled(self._handlers, self._watch)

    def _watch(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the handler of `function`, and record whether it drew dropout or replaced a batch norm."""
        before = self._dropout_replacements.site + self._replaced
        output = self._handlers[function](*args, **kwargs)
        self._caught |= self._dropout_replacements.site + self._replaced != before
        return output

    def _replacement(self, module: Any) -> Callable[..., Any] | None:
        """Return our forward for `module`.

        Returns None if it needs none, for example because its class has its own forward.
        """
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
            with _Handled(self._dropout_replacements.handlers) if module.training else nullcontext():
                return original(*args, **kwargs)

        return forward

    def _normalisation(self, module: Any) -> Callable[[Tensor], Tensor]:
        """Return a `_BatchNorm.forward` with the statistics of all replicas.

        Recomputation does not update them again.
        """

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
        """Compute `torch.nn.functional.batch_norm`. `training` selects the batch's own statistics."""
        if not training or not self._own_normalisation:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        self._replaced += 1
        if self.recomputing:  # already updated; clone, so that as many tensors are saved as before
            running_mean = None if running_mean is None else running_mean.clone()
            running_var = None if running_var is None else running_var.clone()
        if self._group is None:
            return F.batch_norm(input, running_mean, running_var, weight, bias, training, momentum, eps)
        counted = self._position.counted > 0
        return batch_norm(input, weight, bias, running_mean, running_var, momentum, eps, self._group, counted)

    def _contexts(
        self, state: Callable[[], PythonState]
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a block's forward and of its recomputation."""
        return nullcontext(), self._recomputation(state())

    def _selective_contexts(
        self, state: Callable[[], PythonState]
    ) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """Return the contexts of a block that saves the results of its products, see `selective_checkpoint`."""
        forward, again = selective_checkpoint.contexts()
        return forward, _Several(self._recomputation(state()), again)

    def _recomputation(self, state: PythonState) -> _Several:
        site, values = self._dropout_replacements.site, state.read()
        return _Several(lambda: self._again(site, state, values))

    @contextmanager
    def _again(self, site: int, state: PythonState, values: Sequence[Mapping[Any, Any]]) -> Iterator[None]:
        """Draw from `site` on inside the block, as in the first run. The backward pass may run in another thread."""
        later, self._dropout_replacements.site, self.recomputing = self._dropout_replacements.site, site, True
        try:
            with state.as_at(values), self._mode() if self._everywhere.get("forward", True) else nullcontext():
                yield
        finally:
            self._dropout_replacements.site, self.recomputing = later, False


class _Several(AbstractContextManager[None]):
    """Contexts, the outermost first, that may be entered again: a block is recomputed for each derivative of it.

    Args:
        contexts: contexts that may be entered again, or functions that make new ones.
    """

    def __init__(self, *contexts: AbstractContextManager[None] | Callable[[], AbstractContextManager[None]]) -> None:
        self._contexts = contexts
        self._entered: list[ExitStack] = []

    def __enter__(self) -> None:
        with ExitStack() as stack:
            for context in self._contexts:
                stack.enter_context(context if isinstance(context, AbstractContextManager) else context())
            self._entered.append(stack.pop_all())

    def __exit__(self, *error: Any) -> bool | None:
        return self._entered.pop().__exit__(*error)


def _same(before: Any, after: Any) -> bool:
    """Return whether two random states are equal."""
    if isinstance(before, int):
        return bool(before == after)
    with facts():
        return torch.equal(before, after)


class _Handled(TorchFunctionMode):
    """Function mode that calls `watch`, or else the handler itself, in place of each torch function with a handler."""

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
