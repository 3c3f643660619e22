"""Modules that change their weights when they change between training and evaluation, as merged adapters do.

Where the model runs whole on each worker, they work as in one process. Where it is sharded or traced, the weights that
`train()` and `eval()` change are not those that are trained: such a model is refused there.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardwise.errors import WorkloadError
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def check_modes(model: nn.Module, workload: Workload, strategy: Strategy) -> None:
    """Raise WorkloadError if a module of `model` changes weights in `train()` or `eval()`, unless each worker runs it.

    The weights of a refused model may have changed.
    """
    if strategy.runs_module and not strategy.splits_parameters:
        return
    path = _changing(model)
    if path is not None:
        module = model.get_submodule(path)
        where = f"module {path!r}" if path else "the model itself"
        raise WorkloadError(
            f"{where} ({type(module).__name__}) of workload {workload.name!r} changes its weights in train() and "
            f"eval(), which {strategy} cannot follow: use dp alone, or keep the weights apart in evaluation "
            "too (for adapters: do not merge them)"
        )


def _changing(model: nn.Module) -> str | None:
    """Return the path of the innermost module that changes weights with its mode. Returns None if there is none."""
    own = [
        (path, module)
        for path, module in model.named_modules()
        if type(module).train is not nn.Module.train or type(module).eval is not nn.Module.eval
    ]
    return next((path for path, module in reversed(own) if _changes(module)), None)


def _changes(module: nn.Module) -> bool:
    """Put a module into the other mode and back, and return whether a weight was written or replaced."""
    before, training = _storages(module), [each for each in module.modules() if each.training]
    with _Writes({storage for _, _, storage in before}) as writes:
        module.eval()
        changed = _storages(module) != before
        module.train()
    for each in module.modules():
        each.training = each in training
    return changed or writes.found or _storages(module) != before


def _storages(module: nn.Module) -> list[tuple[str, int, int]]:
    """Return name, identity and storage of each parameter and buffer."""
    tensors = [*module.named_parameters(), *module.named_buffers()]
    return [(name, id(tensor), _storage(tensor)) for name, tensor in tensors]


def _storage(tensor: Tensor) -> int:
    number: int = tensor.untyped_storage()._cdata
    return number


class _Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Mode that notices operations that write into one of some storages, whatever the values are."""

    def __init__(self, storages: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._storages = storages
        self.found = False

    def __torch_dispatch__(self, func: Any, types: Sequence[type], args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        for number, argument in enumerate(func._schema.arguments):
            if argument.alias_info is not None and argument.alias_info.is_write:
                value = args[number] if number < len(args) else kwargs.get(argument.name)
                self.found |= isinstance(value, Tensor) and _storage(value) in self._storages
        return func(*args, **kwargs)
