"""Walk through batches, inputs and outputs: containers and dataclasses of tensors."""

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
    """Apply `function` to every tensor in `value`, inside tuples, lists, dicts, registered classes and dataclasses."""

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
    """Return all tensors in `value`, in the containers that `map_tensors` walks through."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    map_tensors(note, value)
    return found


def unlike(batches: Sequence[Any]) -> list[Any]:
    """Return one batch of each structure, shapes and dtypes: a model without values cannot tell the others apart."""
    found: dict[Any, Any] = {}
    for batch in batches:
        leaves, spec = tree_flatten(batch)
        described = (
            (tuple(x.shape), x.dtype) if isinstance(x, Tensor) else (type(x).__name__, repr(x)) for x in leaves
        )
        found.setdefault((str(spec), *described), batch)
    return list(found.values())


def to_device(batch: Any, device: torch.device) -> Any:
    """Return the batch on `device`. On the CPU this is the batch itself."""
    if device.type == "cpu":
        return batch
    return map_tensors(lambda tensor: tensor.to(device, non_blocking=True), batch)


def facts() -> AbstractContextManager[Any]:
    """Disable fake tensors inside the block.

    A dry run too needs the values of the small tensors by which workers agree.
    """
    return unset_fake_temporarily()
