"""The one place where gradients of replicas join: which reducer a strategy uses for which gradients.

gradients                                                       reducer of `Joining`
of parameters that every replica holds (`dp`, `zero=1`), by
DDP or by `GradientReducer`; what `fully_shard` leaves whole    whole
of parameters that `fully_shard` splits                         scattered, then over `dp` mirrored
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from shardwise.parallel.data.reducer import ExactReducer, Reducer
from shardwise.parallel.mesh import Mesh


class Progress(Protocol):
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


def joining_of(mesh: Mesh, position: Progress) -> Joining | None:
    """Return the reducers of a strategy on this worker. Returns None for a single replica.

    Args:
        mesh: this worker's position among all workers.
        position: position in the training, for reducers that follow it.
    """
    strategy, group = mesh.strategy, mesh.replica_group
    if group is None:
        return None
    dtype = torch.bfloat16 if strategy.reduce else None
    whole = ExactReducer(group, strategy.replicas, dtype)

    if not strategy.splits_parameters:
        return Joining(whole)
    sharing = mesh.group("fsdp")
    assert sharing is not None
    return Joining(whole, ExactReducer(sharing, strategy.fsdp, dtype))
