"""Walks over the values that batches, inputs and outputs are made of: containers and dataclasses of tensors."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily
from torch.utils._pytree import tree_flatten, tree_map


def map_tensors(function: Callable[[Tensor], Tensor], value: Any) -> Any:
    """`value` with `function` of its tensors; tuples, lists, dicts, registered classes and dataclasses are entered."""

    def convert(leaf: Any) -> Any:
        if isinstance(leaf, Tensor):
            return function(leaf)
        if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
            changed = copy.copy(leaf)
            for field in dataclasses.fields(leaf):
                object.__setattr__(changed, field.name, map_tensors(function, getattr(leaf, field.name)))
            return changed
        return leaf

    return tree_map(convert, value)


def tensors_of(value: Any) -> list[Tensor]:
    """The tensors that `map_tensors` finds."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def unlike(batches: Sequence[Any]) -> list[Any]:
    """Of batches that are alike but for the values of their tensors the first: a model without values sees no more."""
    found: dict[Any, Any] = {}
    for batch in batches:
        leaves, spec = tree_flatten(batch)
        described = (
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x).__name__, repr(x)) for x in leaves
        )
        found.setdefault((str(spec), *described), batch)
    return list(found.values())


def to_device(batch: Any, device: torch.device) -> Any:
    """A batch on `device`; on the CPU, where it is already, the batch itself."""
    if device.type == "cpu":
        return batch
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def facts() -> AbstractContextManager[Any]:
    """Surrounds what workers find out about each other: these small tensors have values where a dry run has none."""
    return unset_fake_temporarily()
