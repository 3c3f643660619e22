"""Find the repeated blocks of a model by its structure. They are sharded or recomputed one after the other.

A block is a module whose class occurs more than once, outermost first: a transformer's layers, a ResNet's blocks. If a
repeated module consists of repeated blocks itself (the towers of a two-tower model, the stages of a ResNet), the inner
ones are taken. Names and known classes play no part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn

from shardwise.workload.pytree import tensors_of

_REAL_SHARE = 0.1
"""Smallest share of the parameters that a class of blocks must hold; a smaller one stays with the root."""
_MADE_OF = 2 / 3
"""Share of a module's parameters that its inner blocks must hold to be taken in its place."""


def repeated_blocks(model: nn.Module, called: set[nn.Module]) -> list[nn.Module]:
    """Return the blocks of `model` in the order of its modules, none inside another.

    Args:
        model: plain modules.
        called: the result of `steady_modules`. Only these can be blocks, because hooks of a module that is only
            iterated over never run. A block also shares no parameter with other modules.
    """
    found = _descend(model, _fit(model, called, composite=True))
    found = found or _descend(model, _fit(model, called, composite=False))
    whole = _elements(model.parameters())
    shares: Counter[type] = Counter()
    for block in found:
        shares[type(block)] += _elements(block.parameters())
    return [block for block in found if shares[type(block)] >= _REAL_SHARE * whole]


def steady_modules(model: nn.Module, passes: Iterable[Callable[[], object]]) -> set[nn.Module]:
    """Return the modules that can be gathered, hooked or recomputed, as observed in some passes through `model`.

    Each pass calls them exactly once (no experts, no branches), and they do not write into their input tensors. A
    caller would not see such a write if the block is recomputed or its inputs are hooked. A pass returns True if it
    takes derivatives (a gradient penalty), after which no module is steady: its backward pass is run twice.
    """
    called, overwriting = set(model.modules()), set()
    for run in passes:
        calls: Counter[nn.Module] = Counter()
        before: dict[nn.Module, list[tuple[Tensor, int]]] = {}

        def enter(module: nn.Module, args: Any, kwargs: Any, calls: Any = calls, before: Any = before) -> None:
            calls[module] += 1
            before[module] = [(tensor, tensor._version) for tensor in tensors_of((args, kwargs))]

        def leave(module: nn.Module, *_: Any, before: Any = before) -> None:
            if any(tensor._version != version for tensor, version in before.pop(module, ())):
                overwriting.add(module)

        handles = [module.register_forward_pre_hook(enter, with_kwargs=True) for module in model.modules()]
        handles += [module.register_forward_hook(leave) for module in model.modules()]
        try:
            derived = run() is True
        finally:
            for handle in handles:
                handle.remove()
        called = {module for module in called if calls[module] == 1 and not derived}
    return called - overwriting


def _fit(model: nn.Module, called: set[nn.Module], *, composite: bool) -> set[nn.Module]:
    """Return the modules that could be blocks: of a repeated class, always called, with parameters of their own."""
    owners = _owners(model)
    optional = _optional(model, called)
    modules = [
        module
        for module in model.modules()
        if module is not model and module in called - optional and (_is_composite(module) or not composite)
    ]
    repeats = Counter(type(module) for module in modules)

    def alone(module: nn.Module) -> bool:
        inside = set(module.modules())
        parameters = list(module.parameters())
        return bool(parameters) and all(owners[parameter] <= inside for parameter in parameters)

    return {module for module in modules if repeats[type(module)] > 1 and alone(module)}


def _optional(model: nn.Module, called: set[nn.Module]) -> set[nn.Module]:
    """Return the modules with a sibling of their class that was not always called, such as experts of an MoE layer."""
    optional: set[nn.Module] = set()
    for parent in model.modules():
        skipped = {type(child) for child in parent.children() if child not in called}
        optional.update(child for child in parent.children() if type(child) in skipped)
    return optional


def _owners(model: nn.Module) -> dict[Tensor, set[nn.Module]]:
    """Map each parameter to the modules that it is registered in."""
    owners: dict[Tensor, set[nn.Module]] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners.setdefault(parameter, set()).add(module)
    return owners


def _descend(module: nn.Module, fit: set[nn.Module]) -> list[nn.Module]:
    blocks = []
    for child in module.children():
        if child in fit and not _made_of_blocks(child, fit):
            blocks.append(child)
        else:
            blocks.extend(_descend(child, fit))
    return list(dict.fromkeys(blocks))


def _made_of_blocks(module: nn.Module, fit: set[nn.Module]) -> bool:
    """Return whether one repeated class inside `module` holds most of its parameters."""
    inner: dict[type, list[nn.Module]] = {}
    for part in module.modules():
        if part is not module and part in fit:
            inner.setdefault(type(part), []).append(part)
    whole = _elements(module.parameters())
    return any(
        len(parts) > 1 and _elements({p for part in parts for p in part.parameters()}) >= _MADE_OF * whole
        for parts in inner.values()
        if _is_composite(parts[0])
    )


def _is_composite(module: nn.Module) -> bool:
    return any(next(child.parameters(), None) is not None for child in module.children())


def _elements(parameters: Iterable[Tensor]) -> int:
    return sum(parameter.numel() for parameter in parameters)
