"""Optimizer state as named pieces, and the plain numbers of an optimizer and a scheduler.

State with the shape of its parameter is laid out like the parameter. State of any other shape (a step count, a factored
moment) is equal on all workers that update the parameter. It must therefore be a single number, or belong to a
parameter that lies here whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler

from shardwise.errors import CheckpointError
from shardwise.parallel.state.dtensor_rows import is_split, local
from shardwise.parallel.state.layout import Layout, TensorPiece, TensorPlacement


class OptimizerState:
    """State of `optimizer` for the parameters that it updates here.

    Args:
        optimizer: built over `parameters`.
        parameters: parameters by name.
        held: the placement of each on this worker.
        writes: names of the parameters whose state this worker writes.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        held: Mapping[str, TensorPlacement],
        writes: set[str],
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._held = held
        self._writes = writes

    def pieces(self) -> list[TensorPiece]:
        """Return the piece `optimizer/<parameter>/<state>` of every entry that exists."""
        return [
            self._piece(name, key, value)
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            if isinstance(value, (Tensor, int, float))
        ]

    def piece(self, name: str, key: str, shape: Sequence[int], dtype: torch.dtype) -> TensorPiece | None:
        """Return the piece of one entry, created with zeros if it does not exist.

        Returns None for a parameter not updated here.

        Raises:
            CheckpointError: the entry has a shape that cannot be split like its parameter.
        """
        parameter = self._parameters.get(name)
        if parameter is None:
            return None
        state = self._optimizer.state[parameter]
        if not isinstance(state.get(key), Tensor):
            state[key] = self._zeros(name, key, tuple(shape), dtype)
        return self._piece(name, key, state[key])

    def _zeros(self, name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        parameter = self._parameters[name]
        if shape == self._held[name].layout.shape:
            return torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
        if shape and not self._is_whole(name):
            raise self._cannot_cut(name, key, shape)
        return torch.zeros(shape, dtype=dtype, device=parameter.device if shape else self._number_device(parameter))

    def _number_device(self, parameter: Tensor) -> torch.device:
        """Return the device of an optimizer's step counts: the parameter's if fused or capturable, else the CPU."""
        for group in self._optimizer.param_groups:
            if any(member is parameter for member in group["params"]):
                beside = group.get("capturable") or group.get("fused")
                return parameter.device if beside else torch.device("cpu")
        raise AssertionError("a parameter in no group")

    def _piece(self, name: str, key: str, value: Tensor | float) -> TensorPiece:
        held = self._held[name]
        if not isinstance(value, Tensor):
            value = torch.tensor(value, dtype=torch.int64 if isinstance(value, int) else torch.float64)
        entry = f"optimizer/{name}/{key}"
        writes = name in self._writes
        if is_split(value) or tuple(value.shape) == held.layout.local_shape:
            part = local(value)
            if tuple(part.shape) != held.layout.local_shape:
                raise self._cannot_cut(name, key, tuple(value.shape))
            return TensorPiece(entry, part, held.layout, writes)
        if value.dim() and not self._is_whole(name):
            raise self._cannot_cut(name, key, tuple(value.shape))
        # one worker of those that share a parameter writes: the one with its first element
        return TensorPiece(entry, value.detach(), Layout.whole(value.shape), writes and _has_origin(held.layout))

    def _is_whole(self, name: str) -> bool:
        layout = self._held[name].layout
        return layout.local_shape == layout.shape

    def _cannot_cut(self, name: str, key: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"optimizer state {key!r} of {name} has shape {shape}, its parameter {self._held[name].layout.shape}: it "
            "cannot be split with the parameter; use dp or fsdp with zero=1 for this optimizer"
        )


def _has_origin(layout: Layout) -> bool:
    return any(not any(tile.offsets) for tile in layout.tiles)


def schedule_state(optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Return the scheduler's counters and the numbers of the optimizer's groups (learning rates, ...), JSON-able."""
    groups = [] if optimizer is None else optimizer.param_groups
    return {
        "groups": [_plain({key: value for key, value in group.items() if key != "params"}) for group in groups],
        "scheduler": None if scheduler is None else _plain(scheduler.state_dict()),
    }


def load_schedule_state(
    optimizer: torch.optim.Optimizer | None, scheduler: LRScheduler | None, state: Mapping[str, Any]
) -> None:
    """Restore the result of `schedule_state`.

    Raises:
        CheckpointError: the number of parameter groups differs, or a value does not belong to the scheduler or
            optimizer.
    """
    if scheduler is not None and state["scheduler"] is not None:
        known = scheduler.state_dict()
        for key in state["scheduler"]:
            if key not in known and hasattr(scheduler, key):  # a method, or an object that it refers to
                raise CheckpointError(f"the checkpoint has {key!r} among the counts of the scheduler, which is none")
        scheduler.load_state_dict(_like(scheduler.state_dict(), state["scheduler"]))
    if optimizer is None:
        return
    groups = _fitted(list(state["groups"]), len(optimizer.param_groups))
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has {len(groups)} parameter groups, the workload's optimizer makes "
            f"{len(optimizer.param_groups)}: use an optimizer function that makes the same groups for any parameters"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            elif key in group:
                group[key] = _like(group[key], value)


def _fitted(values: list[Any], count: int) -> list[Any]:
    """Repeat `values` to `count` of them if all are equal.

    A worker with few parameters may have fewer groups of them.
    """
    if values and len(values) != count and all(value == values[0] for value in values):
        return values[:1] * count
    return values


_UNKNOWN = object()


def _plain(value: Any) -> Any:
    """Return the part of a value that JSON can hold: None, numbers, strings, and lists and dicts of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        plain = {str(key): _plain(item) for key, item in value.items()}
        return {key: item for key, item in plain.items() if item is not _UNKNOWN}
    if isinstance(value, (list, tuple)):
        return [None if (item := _plain(entry)) is _UNKNOWN else item for entry in value]
    return _UNKNOWN


def _like(model: Any, value: Any) -> Any:
    """Convert a plain value to the types of `model`.

    JSON has neither tuples nor number keys. Entries that JSON left out keep their value in `model`.
    """
    if isinstance(model, Mapping) and isinstance(value, Mapping):
        names = {str(key): key for key in model}
        restored = {names.get(key, key): _like(model.get(names.get(key, key)), item) for key, item in value.items()}
        return type(model)({**model, **restored})  # type: ignore[call-arg]
    if isinstance(model, (list, tuple)) and isinstance(value, list):
        value = _fitted(value, len(model))
        if isinstance(model, tuple) and len(model) != len(value):
            raise CheckpointError(f"the checkpoint has {len(value)} values where the optimizer has {model}")
        if len(model) != len(value):
            return type(model)(value)
        return type(model)(_like(old, new) for old, new in zip(model, value, strict=True))
    if isinstance(model, Tensor):
        return torch.full_like(model, value)
    return model if value is None and callable(model) else value
