"""Errors of compression as named tensors, for checkpoints: what is owed to the gradient of each parameter.

A worker's errors add up to what all workers owe. That sum is stored, in the units of the gradient that the optimizer
gets, with the layout of the parameter. Under any strategy, each worker begins with an equal part of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from weakref import WeakValueDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.engine import Engine
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.state.dtensor_rows import is_split
from shardwise.parallel.state.layout import TensorPiece


class OwedPieces:
    """Errors that the workers of a program owe, in pieces of global tensors `owed/<parameter>`."""

    def __init__(self, engine: Engine, mesh: Mesh) -> None:
        self._engine, self._mesh = engine, mesh
        self._read: WeakValueDictionary[str, Tensor] = WeakValueDictionary()

    def pieces(self) -> list[TensorPiece]:
        """Return this worker's pieces; reading a checkpoint writes into them, and `load` takes them over. Collective.

        Returns an empty list if gradients are not compressed.
        """
        found = dict(self._summed())
        self._read = WeakValueDictionary({name: piece.local for name, piece in found.items()})
        return list(found.values())

    def load(self) -> None:
        """Begin with the values of the result of the last `pieces`, which must still exist."""
        joining = self._engine.joining
        if joining is None or joining.compressed is None:
            return
        reducer = joining.compressed
        errors = {}
        for name, owed in self._read.items():
            part, shape = owed / self._contributors(name), self._shape(name)
            if part.shape != shape:
                part = torch.cat([part, part.new_zeros(shape[0] - len(part), *shape[1:])])
            errors[name] = part
        reducer.load(errors)

    def _summed(self) -> Iterator[tuple[str, TensorPiece]]:
        joining = self._engine.joining
        if joining is None or joining.compressed is None:
            return
        reducer = joining.compressed
        errors = reducer.pieces()
        for name, parameter in sorted(self._engine.parameters.items()):  # in one order on stages that share some
            if self._mesh.strategy.splits_parameters and not is_split(parameter):
                continue
            like = torch.promote_types(parameter.dtype, torch.float32)
            error = errors.get(name)
            owed = torch.zeros(self._shape(name), dtype=like, device=self._mesh.device) if error is None else error
            owed = owed.clone()
            for group in (reducer.group, *self._engine.partial_groups(name)):
                dist.all_reduce(owed, group=group)
            if self._engine.averages:
                owed /= reducer.ranks
            yield name, self._piece(name, owed)

    def _contributors(self, name: str) -> int:
        """Return the number of workers whose errors for a parameter add up to what is owed."""
        joining = self._engine.joining
        assert joining is not None
        assert joining.compressed is not None
        count = 1 if self._engine.averages else joining.compressed.ranks
        for group in self._engine.partial_groups(name):
            count *= dist.get_world_size(group)
        return count

    def _shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a worker's error for a parameter."""
        shape, strategy = self._engine.unsplit_layout(name).local_shape, self._mesh.strategy
        if strategy.splits_parameters and strategy.dp > 1:
            return (-(-shape[0] // strategy.fsdp), *shape[1:])
        return shape

    def _piece(self, name: str, owed: Tensor) -> TensorPiece:
        held, strategy, mesh = self._engine.held[name], self._mesh.strategy, self._mesh
        if strategy.splits_parameters and strategy.dp == 1:
            return TensorPiece(
                f"owed/{name}", owed, self._engine.unsplit_layout(name), held.writes and mesh.coordinate("fsdp") == 0
            )
        rows = owed if not owed.dim() else owed[: held.layout.local_shape[0]].contiguous()
        return TensorPiece(f"owed/{name}", rows, held.layout, held.writes)
