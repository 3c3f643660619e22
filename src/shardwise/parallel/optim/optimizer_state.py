"""Optimizer state as named pieces, and what of it is no tensor as JSON.

State with the shape of its parameter is laid out like the parameter; codes of 8 bits are float32 here, in main memory.
State of any other shape (a step count, a factored moment) is equal on all workers that update the parameter. It must
therefore be a single number, or belong to a parameter that is updated here whole.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.errors import CheckpointError
from shardwise.parallel.optim.block_codes import LEAST, BlockCodec, BlockCodes
from shardwise.parallel.optim.plain_state import Unsaved, decode, encode, tensors_in
from shardwise.parallel.state.dtensor_rows import is_split, local
from shardwise.parallel.state.layout import Layout, TensorPiece, TensorPlacement

SHARED = ""
"""Name, in place of a parameter's, of state that an optimizer keeps for all parameters together."""


class OptimizerState:
    """State of `optimizer` for the parameters that it updates here.

    Args:
        optimizer: built over `parameters`.
        parameters: parameters by name.
        held: the placement of each on this worker.
        writes: names of the parameters whose state this worker writes.
        codec: widens and narrows states in 8 bits; None if states stay as they are.
    """

    def __init__(
        self,
        optimizer: torch.optim.Optimizer,
        parameters: Mapping[str, nn.Parameter],
        held: Mapping[str, TensorPlacement],
        writes: set[str],
        codec: BlockCodec | None = None,
    ) -> None:
        self._optimizer = optimizer
        self._parameters = parameters
        self._held = held
        self._writes = writes
        self._codec = codec
        self._inner: dict[tuple[str, str], Tensor] = {}

    def tensors(self) -> list[Tensor]:
        """Return all tensors of the state as they are stored here."""
        states = self._optimizer.state.values()
        return [local(tensor) for state in states for _, tensor in tensors_in(state, "")]

    def pieces(self) -> list[TensorPiece]:
        """Return the piece `optimizer/<parameter>/<state>` of every tensor; `<state>[1]` is one in a list."""
        return [
            self._piece(name, path, tensor)
            for name, parameter in self._parameters.items()
            for key, value in self._optimizer.state.get(parameter, {}).items()
            for path, tensor in tensors_in(self._widened(value), key)
        ]

    def piece(self, name: str, key: str, shape: Sequence[int], dtype: torch.dtype) -> TensorPiece | None:
        """Return the piece of one tensor, created with zeros if it does not exist.

        Returns None for a parameter not updated here.

        Raises:
            CheckpointError: the tensor has a shape that cannot be split like its parameter.
        """
        parameter = self._parameters.get(name)
        if parameter is None:
            return None
        if key.endswith("]"):  # `load_plain` puts it into its list
            inner = self._inner[name, key] = self._zeros(name, key, tuple(shape), dtype)
            return self._piece(name, key, inner)
        state = self._optimizer.state[parameter]
        if not isinstance(state.get(key), Tensor):
            state[key] = self._zeros(name, key, tuple(shape), dtype)
        return self._piece(name, key, state[key])

    def plain(self) -> dict[str, dict[str, Any]]:
        """Return what is no tensor, JSON-able: parameter -> state -> value, of those that this worker writes.

        Raises:
            Unsaved: a value is of a type that a checkpoint cannot hold.
        """
        found: dict[str, dict[str, Any]] = {}
        names: dict[Tensor, str] = {parameter: name for name, parameter in self._parameters.items()}
        for key, state in self._optimizer.state.items():
            if not isinstance(key, Tensor):
                self._add_shared(found, key, state)
            elif names[key] in self._writes and (values := _encoded(state)):
                found[names[key]] = values
        return found

    def _add_shared(self, found: dict[str, dict[str, Any]], key: Any, value: Any) -> None:
        if type(key) is not str or next(tensors_in(value, key), None) is not None:
            what = f"a tensor that belongs to no parameter ({key})" if type(key) is str else f"the key {key!r}"
            raise Unsaved(what)
        found.setdefault(SHARED, {})[key] = encode(value, key)

    def load_plain(self, saved: Mapping[str, Mapping[str, Any]]) -> None:
        """Restore the result of `plain` of all workers, after the tensors have been read.

        Raises:
            CheckpointError: `saved` is no such result.
        """
        for name, values in saved.items():
            parameter = self._parameters.get(name)
            if not isinstance(values, Mapping):
                raise CheckpointError(f"the checkpoint has no state of the optimizer for {name}")
            if parameter is None and name != SHARED:  # another worker updates it
                continue
            inner = {path: tensor for (owner, path), tensor in self._inner.items() if owner == name}
            decoded = {key: decode(value, inner) for key, value in values.items()}
            if parameter is not None:
                self._optimizer.state[parameter].update(decoded)
            else:
                state: dict[Any, Any] = self._optimizer.state
                state.update(decoded)
        self._inner.clear()

    def _widened(self, value: Any) -> Any:
        if not isinstance(value, BlockCodes):
            return value
        assert self._codec is not None
        return self._codec.widen(value.to(torch.device("cpu")))

    def _zeros(self, name: str, key: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        parameter = self._parameters[name]
        if shape == self._held[name].layout.shape:
            narrowed = self._codec is not None and dtype == torch.float32 and parameter.numel() >= LEAST
            device = torch.device("cpu") if narrowed else parameter.device  # they are narrowed one by one
            return torch.zeros_like(parameter, dtype=dtype, device=device, requires_grad=False)
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

    def _piece(self, name: str, key: str, value: Tensor) -> TensorPiece:
        held = self._held[name]
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
        return TensorPiece(entry, value.detach(), Layout.whole(value.shape), writes and has_origin(held.layout))

    def _is_whole(self, name: str) -> bool:
        layout = self._held[name].layout
        return layout.local_shape == layout.shape

    def _cannot_cut(self, name: str, key: str, shape: tuple[int, ...]) -> CheckpointError:
        return CheckpointError(
            f"optimizer state {key!r} of {name} has shape {shape}, its parameter {self._held[name].layout.shape}: it "
            "cannot be split with the parameter; use dp or fsdp with zero=1 for this optimizer"
        )


def _encoded(state: Mapping[Any, Any]) -> dict[str, Any]:
    for key in state:
        if type(key) is not str or "/" in key or key.endswith("]"):
            raise Unsaved(f"the key {key!r}")
    return {key: encode(value, key) for key, value in state.items() if not isinstance(value, (Tensor, BlockCodes))}


def has_origin(layout: Layout) -> bool:
    """Return whether the first element of a tensor is held here."""
    return any(not any(tile.offsets) for tile in layout.tiles)
