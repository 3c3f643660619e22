"""Selective recomputation: save the results of a block's products and recompute the rest (`recompute=selective`).

Products (matmuls with weights, convolutions and fused attention) take most of a block's time. Norms, activation
functions, dropout and unfused attention take much of its memory and little time (Korthikanti et al. 2022, section 5).
So the results of the former are saved, and the latter are recomputed from them.

Torch's own `create_selective_checkpoint_contexts` requires that recomputation performs exactly the same operations.
Ours does not, because its changes to buffers are undone (`module_patches`, `stage`). Torch's version also refuses
results that a model has written into.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from shardwise.strategy import PRODUCTS


def contexts() -> tuple[SavingMode, ReplayMode]:
    """Return the contexts of a block's forward and of its recomputation, for `torch.utils.checkpoint`."""
    saving = SavingMode()
    return saving, ReplayMode(saving)


_NOT_SAVED = ContextVar("_NOT_SAVED", default=False)


@contextmanager
def products_not_saved() -> Iterator[None]:
    """Save no results of products inside the block: what it computes is not recomputed."""
    token = _NOT_SAVED.set(True)
    try:
        yield
    finally:
        _NOT_SAVED.reset(token)


def is_saved(operation: Any) -> bool:
    """Return whether the result of an operation, as passed to a dispatch mode, is saved."""
    return _is_product(operation) and not _NOT_SAVED.get()


@lru_cache(maxsize=4096)
def _is_product(operation: Any) -> bool:
    return f"{operation.namespace}.{operation.overloadpacket.__name__}" in PRODUCTS


class _Mode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Dispatch mode under which compiled regions run as they are: they contain no products (`compiling.regions`)."""

    @classmethod
    def ignore_compile_internals(cls) -> bool:
        """Return that torch's compiler need not see what the mode would do."""
        return True


class SavingMode(_Mode):
    """Dispatch mode that saves the results of products, in order.

    Attributes:
        results: each result with the version counters of its tensors, which count the writes into them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: deque[tuple[Any, list[int]]] = deque()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if is_saved(function):
            saved = tree_map(lambda value: _detached(value) if isinstance(value, Tensor) else value, result)
            self.results.append((saved, _versions(saved)))
        return result


class ReplayMode(_Mode):
    """Dispatch mode that returns saved results instead of computing them. A result written into since is recomputed."""

    def __init__(self, saving: SavingMode) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._saving = saving

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_saved(function) and self._saving.results:
            saved, versions = self._saving.results.popleft()
            if _versions(saved) == versions:
                return saved
        return function(*args, **(kwargs or {}))


def _detached(tensor: Tensor) -> Tensor:
    """Return an alias of `tensor` that is not part of the autograd graph. That graph would hold this mode alive.

    Below autograd, where modes run, a detached tensor has its own version counter, unless the guard is set; torch's own
    checkpoints do the same.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(result: Any) -> list[int]:
    found = result if isinstance(result, (tuple, list)) else (result,)
    return [value._version for value in found if isinstance(value, Tensor)]
