"""State that forward and backward passes may change besides gradients, and how to put it back.

It is what a pass leaves behind in buffers, in plain attributes of modules (`self.calls += 1`) and in the random
generators of Python, NumPy and torch.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that every module has; torch keeps parameters, buffers, submodules and hooks in them."""

_PLAIN = (type(None), bool, int, float, complex, str, bytes)


@contextmanager
def passes_undone(modules: Iterable[nn.Module], buffers: Iterable[Tensor], device: torch.device) -> Iterator[None]:
    """Undo what passes inside the block change besides gradients.

    Args:
        modules: modules whose plain attributes to put back: numbers, texts, tensors, and containers of them.
        buffers: tensors whose values to put back, besides the buffers of `modules`.
        device: device whose random generator to put back, besides the CPU's.
    """
    modules = list(modules)
    attributes = [(module, _plain_attributes(module)) for module in modules]
    kept = [*buffers, *(buffer for module in modules for buffer in module.buffers(recurse=False))]
    kept += [leaf for _, before in attributes for leaf in tree_leaves(before) if isinstance(leaf, Tensor)]
    values = [(tensor, tensor.detach().clone()) for tensor in {id(tensor): tensor for tensor in kept}.values()]
    held = [(module._buffers, dict(module._buffers)) for module in modules]
    with random_state_kept(device):
        try:
            yield
        finally:
            for buffers_of, before in held:
                buffers_of.update(before)
            with torch.no_grad():
                for tensor, value in values:
                    tensor.detach().copy_(value)
            for module, before in attributes:
                _put_back(module, before)


@contextmanager
def random_state_kept(device: torch.device) -> Iterator[None]:
    """Put the state of the random generators of Python, NumPy and torch back after the block."""
    python, numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _plain_attributes(module: nn.Module) -> dict[str, Any]:
    """Return copies of the attributes of one module that hold plain values."""
    own = {name: value for name, value in vars(module).items() if name not in _OF_TORCH}
    return {name: _copied(value) for name, value in own.items() if _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple, set, frozenset)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(map(_is_plain, value.values()))
    return isinstance(value, (*_PLAIN, Tensor))


def _copied(value: Any) -> Any:
    """Copy the containers of a plain value; its tensors stay the same objects."""
    if isinstance(value, dict):
        return {key: _copied(entry) for key, entry in value.items()}
    if isinstance(value, (list, set)):
        return type(value)(map(_copied, value))
    return copy.copy(value) if isinstance(value, (tuple, frozenset)) else value


def _put_back(module: nn.Module, before: dict[str, Any]) -> None:
    """Set the plain attributes of a module back, and remove those that are new."""
    for name in [name for name, value in vars(module).items() if name not in _OF_TORCH and name not in before]:
        if _is_plain(vars(module)[name]):
            delattr(module, name)
    for name, value in before.items():
        now: Any = vars(module).get(name)
        if isinstance(value, list) and type(now) is list:
            now[:] = value
        elif isinstance(value, (dict, set)) and type(now) is type(value):
            now.clear()
            now.update(value)
        else:
            vars(module)[name] = value
