"""Relative error between the tensors of two runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from shardwise.workload.data import Share

NO_PROOF = "that proves nothing"
"""End of a message about numbers that are not finite on one worker either."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """Largest relative error over some tensors, the name of that tensor, and a reason that may be empty.

    The error is infinite for a tensor that is missing, has another shape, or holds nan.
    """

    error: float = 0.0
    tensor: str = ""
    why: str = ""

    def __or__(self, other: Deviation) -> Deviation:
        """Return the larger deviation of the two."""
        return other if other.error > self.error else self


def loss_deviation(value: float, alone: float, step: str) -> Deviation:
    """Return the relative error of a loss against one worker's; it is infinite if either loss is not finite."""
    if not math.isfinite(alone):
        return Deviation(math.inf, step, f"is {alone} on one worker and {value} in parallel: {NO_PROOF}")
    if not math.isfinite(value):
        return Deviation(math.inf, step, f"is {value} in parallel only")
    return Deviation(abs(value - alone) / max(abs(alone), 1e-30), step)


def same_data(first: Share, second: Share) -> bool:
    """Return whether two shares hold equal data."""
    a, b = (tree_leaves([microbatch.data for microbatch in share.microbatches]) for share in (first, second))
    return len(a) == len(b) and all(
        torch.equal(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else x == y
        for x, y in zip(a, b, strict=True)
    )


def typical_size(tensors: Mapping[str, Tensor]) -> float:
    """Return the root mean square over all elements of the floating-point tensors."""
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    elements = sum(tensor.numel() for tensor in floats)
    squares = sum(float(tensor.double().square().sum()) for tensor in floats)
    return math.sqrt(squares / elements) if elements else 0.0


def deviation(
    actual: Mapping[str, Tensor],
    expected: Mapping[str, Tensor],
    *,
    counted: Mapping[str, Tensor] | None = None,
    typical: float | None = None,
) -> Deviation:
    """Return the largest over tensors of the relative error ||a - b|| / max(||b||, typical norm of its size).

    The typical norm is the scale for tensors that are zero up to rounding. Integers and infinities must be equal. A
    tensor that holds nan has an infinite error, because it proves nothing.

    Args:
        actual: tensors by name.
        expected: tensors by name.
        counted: masks of the elements to compare, by name; tensors without a mask are compared as a whole.
        typical: typical size of an element; None: root mean square of `expected`.
    """
    typical = typical_size(expected) if typical is None else typical
    worst = Deviation()
    for name, why in _of_other_kind(actual, expected):
        worst |= Deviation(math.inf, name, why)
    for name in sorted(actual.keys() & expected.keys()):
        a, b = actual[name], expected[name]
        if a.shape == b.shape:
            mask = None if counted is None else counted.get(name)
            worst |= Deviation(_error(a, b, mask, typical), name, _holds_nan(a, b))
    return worst


def _of_other_kind(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Iterator[tuple[str, str]]:
    for name in sorted(actual.keys() ^ expected.keys()):
        yield name, "is there in parallel only" if name in actual else "is missing in parallel"
    for name in sorted(actual.keys() & expected.keys()):
        if actual[name].shape != expected[name].shape:
            yield name, f"has shape {tuple(actual[name].shape)}, not {tuple(expected[name].shape)}"


def _holds_nan(actual: Tensor, expected: Tensor) -> str:
    """Return a phrase on which of two tensors holds nan. Returns an empty string if neither does."""
    here, alone = bool(actual.isnan().any()), bool(expected.isnan().any())
    if here and alone:
        return f"holds nan on one worker and in parallel: {NO_PROOF}"
    return "holds nan in parallel only" if here else "holds nan on one worker only" if alone else ""


def _error(actual: Tensor, expected: Tensor, mask: Tensor | None, typical: float) -> float:
    if expected.is_complex() and actual.is_complex():
        pairs = None if mask is None else torch.stack([mask, mask], -1)
        return _error(torch.view_as_real(actual), torch.view_as_real(expected), pairs, typical)
    if not expected.is_floating_point():
        return 0.0 if torch.equal(actual, expected) else math.inf
    a, b = actual.double(), expected.double()
    if bool(a.isnan().any()) or bool(b.isnan().any()):
        return math.inf
    if mask is not None:
        a, b = a[mask], b[mask]
    infinite = a.isinf() | b.isinf()
    if bool(infinite.any()):
        if not torch.equal(a[infinite], b[infinite]):
            return math.inf
        a, b = a[~infinite], b[~infinite]
    scale = max(float(b.norm()), typical * math.sqrt(b.numel()))
    difference = float((a - b).norm())
    return difference / scale if scale else difference
