"""The repeated blocks of a model, found by its structure: what is sharded, or recomputed, one after the other.

A block is a module whose class occurs more than once, outermost first: a transformer's layers, a ResNet's blocks. Where
a repeated module is made of repeated blocks itself (the towers of a two-tower model, the stages of a ResNet), those
are taken. Names and known classes play no part.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable

from torch import Tensor, nn

_REAL_SHARE = 0.1
"""A class of blocks that holds less of the parameters than this stays with the root."""
_MADE_OF = 2 / 3
"""A module is made of inner blocks where these hold at least this share of its parameters."""


def repeated_blocks(model: nn.Module, called: set[nn.Module]) -> list[nn.Module]:
    """The blocks of `model` in the order of its modules, none inside another.

    Args:
        model: plain modules.
        called: modules whose forward every pass calls once, see `called_once`: a block is one of them (the hooks of
            what is only iterated over never run) and shares no parameter with other modules.
    """
    found = _descend(model, _fit(model, called, composite=True))
    found = found or _descend(model, _fit(model, called, composite=False))
    whole = _elements(model.parameters())
    shares: Counter[type] = Counter()
    for block in found:
        shares[type(block)] += _elements(block.parameters())
    return [block for block in found if shares[type(block)] >= _REAL_SHARE * whole]


def called_once(model: nn.Module, passes: Iterable[Callable[[], object]]) -> set[nn.Module]:
    """The modules inside `model` that every one of some passes calls once: no experts, no branches."""
    modules = set(model.modules())
    for run in passes:
        calls = count_calls(model, run)
        modules = {module for module in modules if calls[module] == 1}
    return modules


def count_calls(model: nn.Module, run: Callable[[], object]) -> Counter[nn.Module]:
    """How often each module inside `model` is called while `run` runs."""
    calls: Counter[nn.Module] = Counter()

    def count(module: nn.Module, _: object) -> None:
        calls[module] += 1

    handles = [module.register_forward_pre_hook(count) for module in model.modules()]
    try:
        run()
    finally:
        for handle in handles:
            handle.remove()
    return calls


def _fit(model: nn.Module, called: set[nn.Module], *, composite: bool) -> set[nn.Module]:
    """Modules that could be blocks: of a repeated class, always called, with parameters that nobody else uses."""
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
    """Modules with a sibling of their class that was not always called: experts, of which each sample takes some."""
    optional: set[nn.Module] = set()
    for parent in model.modules():
        skipped = {type(child) for child in parent.children() if child not in called}
        optional.update(child for child in parent.children() if type(child) in skipped)
    return optional


def _owners(model: nn.Module) -> dict[Tensor, set[nn.Module]]:
    """Parameter -> the modules that it is registered in."""
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
    """Whether one repeated class inside `module` holds most of its parameters."""
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
