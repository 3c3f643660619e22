"""Blocks of which the products are kept and the rest is computed again (`recompute=selective`).

Products with weights, convolutions and fused attention take most of a block's time; norms, activation functions,
dropout and attention that is spelled out take much of its memory and little time (Korthikanti et al. 2022, section 5).
So the results of the former stay, and the latter are computed again from them.

Torch's own `create_selective_checkpoint_contexts` wants a block to do the very same operations again; ours do not, for
what they did to buffers is undone (`operations`, `stage`), and it refuses results that a model has written into.
"""

from __future__ import annotations

from collections import deque
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map

from shardwise.strategy import PRODUCTS


def contexts() -> tuple[Keeping, Recalling]:
    """What surrounds a block's forward, and its recomputation, for `torch.utils.checkpoint`."""
    keeping = Keeping()
    return keeping, Recalling(keeping)


@lru_cache(maxsize=4096)
def is_product(operation: Any) -> bool:
    """Whether the result of an operation, as a dispatch mode is given it, is kept."""
    return f"{operation.namespace}.{operation.overloadpacket.__name__}" in PRODUCTS


class Keeping(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Keeps the results of products, in order.

    Attributes:
        results: each with the versions of its tensors, which count what was written into them.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.results: deque[tuple[Any, list[int]]] = deque()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if is_product(function):
            kept = tree_map(lambda value: _detached(value) if isinstance(value, Tensor) else value, result)
            self.results.append((kept, _versions(kept)))
        return result


class Recalling(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Gives back what was kept in place of computing it; what was written into since is computed again."""

    def __init__(self, keeping: Keeping) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._keeping = keeping

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if is_product(function) and self._keeping.results:
            kept, versions = self._keeping.results.popleft()
            if _versions(kept) == versions:
                return kept
        return function(*args, **(kwargs or {}))


def _detached(tensor: Tensor) -> Tensor:
    """The same tensor for us: autograd makes the other one a part of the graph that holds this mode.

    Below autograd, where modes are, a detached tensor counts what is written into it for itself, unless told otherwise;
    torch's own checkpoints do that in the same way.
    """
    with torch._C._SetExcludeDispatchKeyGuard(torch._C.DispatchKey.ADInplaceOrView, False):
        return tensor.detach()


def _versions(result: Any) -> list[int]:
    found = result if isinstance(result, (tuple, list)) else (result,)
    return [value._version for value in found if isinstance(value, Tensor)]
