"""Gradients of their true size for a model's own backward code, where replicas compute larger ones to average them.

DDP and FSDP average gradients over the replicas, so each backward pass starts with `factor` times the true gradient. A
backward that is not linear (`clamp` in an `autograd.Function`, in a hook on a tensor or on a module) must not see that:
it gets the gradient divided by `factor`, and what it returns is multiplied by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch.autograd import function as functions

from shardwise.workload.pytree import map_tensors

_BASE: Any = functions._SingleLevelFunction


@contextmanager
def true_gradients(factor: float) -> Iterator[None]:
    """Give custom functions called and hooks registered inside the context gradients of their true size.

    Args:
        factor: size of the gradients of the backward pass in proportion to the true ones.
    """
    if factor == 1:
        yield
        return
    register: Callable[..., Any] = Tensor.register_hook

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        original = super(_BASE, cls).apply
        if _own(cls):
            return original(*args, **kwargs)
        args = tuple(_times(value, factor) for value in args)
        kwargs = {key: _times(value, factor) for key, value in kwargs.items()}
        output = original(*args, **kwargs)
        if isinstance(output, tuple):
            return tuple(_times(value, 1 / factor) for value in output)
        return _times(output, 1 / factor)

    def register_hook(tensor: Tensor, hook: Callable[..., Any]) -> Any:
        return register(tensor, hook if _own(hook) else _scaled(hook, factor))

    with (
        mock.patch.object(_BASE, "apply", classmethod(apply), create=True),
        mock.patch.object(Tensor, "register_hook", register_hook),
    ):
        yield


def scale_module_hooks(model: nn.Module, factor: float) -> None:
    """Give the hooks on the backward passes of modules gradients of their true size. Changes the modules in place."""
    if factor == 1:
        return
    for module in model.modules():
        for hooks in (module._backward_hooks, module._backward_pre_hooks):
            for number, hook in hooks.items():
                hooks[number] = _scaled(hook, factor)


def _own(thing: Any) -> bool:
    """Return whether a function is torch's or ours, which is linear."""
    return str(getattr(thing, "__module__", "")).startswith(("torch.", "shardwise."))


def _scaled(hook: Callable[..., Any], factor: float) -> Callable[..., Any]:
    """Return a hook that counts as ours, so that it is not scaled again where torch registers it a second time."""

    def divided(value: Any) -> Any:
        return value if isinstance(value, nn.Module) else map_tensors(lambda tensor: tensor / factor, value)

    def scaled(*args: Any) -> Any:
        result = hook(*map(divided, args))
        return None if result is None else map_tensors(lambda tensor: tensor * factor, result)

    return scaled


def _times(value: Any, factor: float) -> Any:
    """Return a tensor whose gradient is `factor` times as large on its way back; other values unchanged."""
    if isinstance(value, Tensor) and value.requires_grad and torch.is_grad_enabled():
        return _Times.apply(value, factor)  # type: ignore[no-untyped-call]
    return value


class _Times(torch.autograd.Function):
    """Identity whose gradient is scaled."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, factor: float) -> Tensor:
        ctx.factor = factor
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return gradients[0] * ctx.factor, None
