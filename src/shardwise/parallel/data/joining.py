"""The one place where gradients of replicas join: which reducer a strategy uses for which gradients.

gradients                                                       reducer of `Joining`
of parameters that every replica holds (`dp`, `zero=1`), by
DDP or by `GradientReducer`; what `fully_shard` leaves whole    whole
of parameters that `fully_shard` splits                         scattered, then over `dp` mirrored
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Protocol

import torch

from shardwise.parallel.data.compression.reducer import CompressedReducer
from shardwise.parallel.data.reducer import ExactReducer, Reducer
from shardwise.parallel.mesh import Mesh


class ReducerClock(Protocol):
    """Position in a training, as far as reducers look at it; `engine.Position` is one."""

    step: int
    exact: bool


@dataclass(frozen=True)
class Joining:
    """Reducers of a worker's gradients; see the module's docstring.

    Attributes:
        whole: over all replicas, of gradients that each holds whole.
        scattered: over `fsdp`, of gradients that are reduce-scattered; None if there are none.
        mirrored: over `dp`, of the parts that result; None if `dp` is 1 or torch joins both with one mesh.
    """

    whole: Reducer
    scattered: Reducer | None = None
    mirrored: Reducer | None = None

    def keep_exact(self, names: Iterable[str]) -> None:
        """Let the gradients of the parameters `names` never be compressed."""
        if self.compressed is not None:
            self.compressed.exact = frozenset(names)

    @property
    def compressed(self) -> CompressedReducer | None:
        """Return the reducer that compresses; there is at most one. Returns None if none does."""
        for each in (self.whole, self.scattered, self.mirrored):
            if isinstance(each, CompressedReducer):
                return each
        return None


def joining_of(mesh: Mesh, position: ReducerClock) -> Joining | None:
    """Return the reducers of a strategy on this worker. Returns None for a single replica, and for parameter servers.

    Of `dp` and `fsdp` in one strategy, only what crosses `dp` is compressed: its ranks are farther apart.

    Args:
        mesh: this worker's position among all workers.
        position: position in the training, which says what is joined exactly.
    """
    strategy, group = mesh.strategy, mesh.replica_group
    if group is None or strategy.ps:
        return None
    dtype = torch.bfloat16 if strategy.reduce else None
    whole = ExactReducer(group, strategy.replicas, dtype)

    def exactly() -> bool:
        return position.exact or position.step < strategy.plain_steps

    if not strategy.splits_parameters:
        return Joining(CompressedReducer(group, strategy.compress, exactly) if strategy.compress else whole)
    sharing, across = mesh.group("fsdp"), mesh.group("dp")
    assert sharing is not None
    scattered = ExactReducer(sharing, strategy.fsdp, dtype)
    if not strategy.compress:
        return Joining(whole, scattered)
    if across is None:
        return Joining(whole, CompressedReducer(sharing, strategy.compress, exactly))
    return Joining(whole, scattered, CompressedReducer(across, strategy.compress, exactly))
