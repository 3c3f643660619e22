"""Collectives as torch's dispatcher sees them: from Python, from DDP's reducer and from `fully_shard` alike.

Every call of a process group arrives there exactly once, as an operation of `c10d` (or, as functional collectives do
it, of `_c10d_functional`, which reaches the process group without a second one).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, _resolve_process_group

from shardwise.collective import Collective, Group
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline import goes_back
from shardwise.predict.counting import tensors

_OPERATIONS = {
    "allreduce_": ("all_reduce", 0),
    "allreduce_coalesced_": ("all_reduce", 0),
    "broadcast_": ("broadcast", 0),
    "reduce_": ("reduce", 0),
    "allgather_": ("all_gather", 0),
    "_allgather_base_": ("all_gather", 0),
    "allgather_coalesced_": ("all_gather", 0),
    "allgather_into_tensor_coalesced_": ("all_gather", 0),
    "reduce_scatter_": ("reduce_scatter", 1),
    "_reduce_scatter_base_": ("reduce_scatter", 1),
    "reduce_scatter_tensor_coalesced_": ("reduce_scatter", 1),
    "alltoall_": ("all_to_all", 1),
    "alltoall_base_": ("all_to_all", 1),
    "send": ("send", 0),
    "recv_": ("recv", 0),
    "barrier": ("barrier", None),
}
"""Operation of `c10d` -> what it is called here, and which argument its bytes are those of."""

_FUNCTIONAL = {
    "all_reduce": ("all_reduce", False),
    "all_reduce_": ("all_reduce", False),
    "all_reduce_coalesced": ("all_reduce", False),
    "all_reduce_coalesced_": ("all_reduce", False),
    "broadcast": ("broadcast", False),
    "broadcast_": ("broadcast", False),
    "all_gather_into_tensor": ("all_gather", True),
    "all_gather_into_tensor_out": ("all_gather", True),
    "all_gather_into_tensor_coalesced": ("all_gather", True),
    "reduce_scatter_tensor": ("reduce_scatter", False),
    "reduce_scatter_tensor_out": ("reduce_scatter", False),
    "reduce_scatter_tensor_coalesced": ("reduce_scatter", False),
    "all_to_all_single": ("all_to_all", False),
}
"""Operation of `_c10d_functional` -> what it is called here, and whether its bytes are those of the result."""

_SILENT = {"wait_tensor", "check_for_nan", "monitored_barrier_"}


class UnknownCollective(NotImplementedError):
    """An operation of a process group that no strategy is known to use."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The ranks that differ from this one along each axis of a strategy.

    Attributes:
        members: (axis, global ranks), innermost first; the last is all of them.
    """

    members: tuple[tuple[str, frozenset[int]], ...]

    @classmethod
    def of(cls, mesh: Mesh | None) -> Axes:
        """Those of a worker's mesh; None: nothing is known of an axis."""
        if mesh is None or mesh.grid is None:
            return cls(())
        found = [
            (axis, frozenset(dist.get_process_group_ranks(group)))
            for axis in reversed(mesh.strategy.axes)
            if (group := mesh.group(axis)) is not None
        ]
        if mesh.replicas is not None:
            found.append(("dp", frozenset(dist.get_process_group_ranks(mesh.replicas.get_group()))))
        return cls((*found, ("world", frozenset(range(dist.get_world_size())))))

    def name(self, ranks: Sequence[int]) -> str:
        """The innermost axis along which all of `ranks` lie; empty where there is none."""
        return next((axis for axis, members in self.members if members.issuperset(ranks)), "")


def is_collective(operation: Any) -> bool:
    """Whether an operation of the dispatcher is one of a process group."""
    return operation.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")


def collective_of(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, axes: Axes, when: str
) -> Collective | None:
    """The collective that a call of `operation` is; None where it only waits.

    Raises:
        UnknownCollective: it is none of those that are known.
    """
    name = operation.overloadpacket.__name__
    if name in _SILENT:
        return None
    given = {**dict(zip((a.name for a in operation._schema.arguments), args, strict=False)), **kwargs}
    if operation.namespace == "c10d":
        if name not in _OPERATIONS:
            raise UnknownCollective(f"c10d.{name}")
        kind, counted = _OPERATIONS[name]
        moved = () if counted is None else args[counted]
        group = ProcessGroup.unbox(given["process_group"])
        asynchronous = bool(given.get("async_op", True))
    else:
        if name not in _FUNCTIONAL:
            raise UnknownCollective(f"{operation.namespace}.{name}")
        kind, of_result = _FUNCTIONAL[name]
        moved = result if of_result else args[0]
        group, asynchronous = _resolve_process_group(given["group_name"]), True
    ranks = dist.get_process_group_ranks(group)
    if kind in ("send", "recv"):
        other = ranks[given["dst" if kind == "send" else "src"]]
        ranks = sorted((dist.get_rank(), other))
        when = "backward" if goes_back(given["tag"]) else "forward"  # receives are posted before their pass
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(moved))
    axis = axes.members[-1][0] if when == "report" and axes.members else axes.name(ranks)
    return Collective(kind, size, Group.of(ranks), axis, when, asynchronous)
