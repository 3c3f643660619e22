"""Custom autograd functions, each call of which is one call in the graph of a step.

A trace records what the forward of a `torch.autograd.Function` computes, and would lose its backward. Instead the
function is called as it is when the graph runs, as a module that cannot be traced is (`workload.trace.opaque`). In the
trace its forward runs once on tensors without data, which tells the shapes of its results.

What cannot be one call (it uses tensors that are not its arguments, changes its arguments, or draws random numbers)
and what takes derivatives itself fails the trace, so that the module around it is called as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd import function as functions
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_unflatten

from shardwise.workload.trace.opaque import Call, entered, filled, split

_BASE: Any = functions._SingleLevelFunction
"""Class of torch whose `apply` each `apply` of a custom function calls, also one that was looked up before."""


class _Applied(nn.Module):
    """Module whose forward is one call of an autograd function."""

    def __init__(self, function: Any) -> None:
        super().__init__()
        self._function = function

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self._function.apply(*args, **kwargs)


@contextmanager
def functions_kept() -> Iterator[list[Call]]:
    """Make each call of a custom autograd function one call in the graph that is traced inside the context.

    Yields the list of these calls. Hold it for as long as the graph is not analysed: the graph has only their numbers.
    """
    inside = False
    alive: list[Call] = []

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        original = super(_BASE, cls).apply
        if inside or cls.__module__.startswith("torch.") or not _tensors((args, kwargs)):
            return original(*args, **kwargs)
        inside = True
        try:
            tensors, _, _ = split((args, kwargs))
            alive.append(_call(cls, original, args, kwargs))
            return entered(alive[-1], tensors)
        finally:
            inside = False

    def transformed(cls: Any, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{_named(cls)}, an autograd.Function, is called inside a transform of torch.func")

    with (
        mock.patch.object(_BASE, "apply", classmethod(apply), create=True),
        mock.patch.object(functions, "custom_function_call", transformed),
    ):
        yield alive


def _call(cls: Any, original: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Call:
    """Describe one call of a function from a run on tensors without data, which the trace does not see."""
    name = _named(cls)
    tensors, leaves, spec = split((args, kwargs))
    with disable_proxy_modes_tracing(), torch._C.DisableTorchFunction(), torch.enable_grad():
        given = [_apart(tensor) for tensor in tensors]
        versions = [tensor._version for tensor in given]
        apart_args, apart_kwargs = tree_unflatten(filled(leaves, given), spec)
        with _Looked(name, given):
            output = original(*apart_args, **apart_kwargs)
        if versions != [tensor._version for tensor in given]:
            raise TypeError(f"{name}, an autograd.Function, changes its arguments in place")
        made, results, result_spec = split(output)
        return Call(
            module=_Applied(cls),
            path=name,
            reason=f"{name}, an autograd.Function, has a backward of its own",
            state=(),
            leaves=leaves,
            spec=spec,
            outputs=tuple(torch.empty(each.shape, dtype=each.dtype, device="meta") for each in made),
            results=results,
            result_spec=result_spec,
            draws=0,
            modes={},
            differentiable=tuple(each.requires_grad for each in made),
        )


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _named(cls: Any) -> str:
    return str(cls.__qualname__).rpartition("<locals>.")[2]


def _apart(tensor: Tensor) -> Tensor:
    """Return the tensor without its history, as one that a gradient flows back to.

    It is no leaf, because a function may check that it changes no leaf in place.
    """
    apart = tensor.detach()
    if apart.is_floating_point() or apart.is_complex():
        apart = apart.requires_grad_().view_as(apart)
    return apart


class _Looked(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode that refuses what a function that is one call of the graph must not do in its forward."""

    def __init__(self, name: str, given: Sequence[Tensor]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._name = name
        self._known = list(given)
        self._ids = set(map(id, given))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if torch.Tag.nondeterministic_seeded in function.tags:
            raise TypeError(f"{self._name}, an autograd.Function, draws random numbers")
        foreign = [t for t in _tensors((args, kwargs)) if isinstance(t, FakeTensor) and id(t) not in self._ids]
        if foreign:
            raise TypeError(f"{self._name}, an autograd.Function, uses a tensor that is not one of its arguments")
        output = function(*args, **(kwargs or {}))
        made = _tensors(output)
        self._known += made  # or another tensor may get the id of one
        self._ids.update(map(id, made))
        return output


_REFUSED: dict[Any, str] = {
    torch.autograd.grad: "takes a derivative itself (torch.autograd.grad)",
    torch.autograd.backward: "takes a derivative itself (torch.autograd.backward)",
    Tensor.backward: "takes a derivative itself (Tensor.backward)",
    Tensor.register_hook: "registers a hook on a tensor (Tensor.register_hook)",
}


class DerivativesRefused(TorchFunctionMode):
    """Function mode that fails a trace where the step takes derivatives or hooks itself into the backward pass."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function in _REFUSED:
            raise NotImplementedError(_REFUSED[function])
        return function(*args, **(kwargs or {}))
