"""Workloads in double precision, to tell real differences from rounding errors.

Parameters, buffers and batches are converted. Modules that explicitly ask for float32 (a norm that computes wider than
bfloat16, a softmax with a dtype) would round in the middle, so they get float64 as well.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map
from torch.utils.data import default_collate

from shardwise.workload.weight_files import weights_of
from shardwise.workload.workload import Workload


def in_float64(workload: Workload) -> Workload:
    """Return the workload with all floating-point numbers in float64 and without evaluation."""
    collate = workload.collate or default_collate
    return replace(
        workload,
        model=_WideModel(workload.model),
        collate=lambda samples: to_float64(collate(samples)),
        loss=_wide_loss(workload.loss),
        step=_wide_step(workload),
        evaluation=None,
        stop=None,
        precision="float32",
    )


def to_float64(values: Any) -> Any:
    """Convert the floating-point tensors among `values` to float64."""

    def convert(leaf: Any) -> Any:
        return leaf.double() if isinstance(leaf, Tensor) and leaf.is_floating_point() else leaf

    return tree_map(convert, values)


class _WideModel:
    """Factory of the same model in float64."""

    def __init__(self, factory: Callable[[], nn.Module]) -> None:
        self._factory = factory
        self.weights = weights_of(factory)

    def __call__(self) -> nn.Module:
        model = self._factory().double()
        model.forward = _wide(model.forward)
        return model


def _wide_step(workload: Workload) -> Any:
    if workload.turns:
        return [replace(turn, step=_wide_loss(turn.step)) for turn in workload.turns]
    return None if workload.step is None else _wide_loss(workload.steps[0])


def _wide_loss(loss: Callable[..., Any]) -> Callable[..., Any]:
    if not isinstance(loss, nn.Module):
        return _wide(loss)
    module = copy.deepcopy(loss).double()
    module.forward = _wide(module.forward)
    return module


def _wide(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with _Float64():
                return function(*args, **kwargs)
        finally:
            torch.set_default_dtype(default)

    return call


class _Float64(TorchFunctionMode):
    """Mode that replaces float32 by float64 in the arguments of torch functions."""

    def __torch_function__(
        self, function: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Any = None
    ) -> Any:
        if function is Tensor.float:
            function, args = Tensor.double, args[:1]
        if function in _GROUPED:
            return _grouped_product(*args, **(kwargs or {}))
        return function(*map(_widened, args), **{key: _widened(value) for key, value in (kwargs or {}).items()})


_GROUPED = tuple(
    found
    for found in (getattr(torch, "_grouped_mm", None), getattr(torch.nn.functional, "grouped_mm", None))
    if found is not None
)
"""Functions that multiply the rows of each expert with its matrix, for which torch has no float64 kernel."""


def _grouped_product(a: Tensor, b: Tensor, *, offs: Tensor, **_: Any) -> Tensor:
    """Multiply the rows of `a` with the matrix of their group.

    `a` is (rows, k), `b` is (groups, k, n), and `offs` (groups,) has the end of each group's rows.
    """
    rows = torch.arange(a.shape[0], device=a.device, dtype=offs.dtype)
    group = torch.searchsorted(offs, rows, right=True)
    return torch.bmm(a.unsqueeze(1), b[group]).squeeze(1)


def _widened(value: Any) -> Any:
    return torch.float64 if value is torch.float32 else value
