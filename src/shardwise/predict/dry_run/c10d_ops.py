"""Recognize collectives in torch's dispatcher, whether Python, DDP's reducer or `fully_shard` issues them.

Every call of a process group passes the dispatcher exactly once, as an operation of `c10d`. Functional collectives
appear as an operation of `_c10d_functional` instead, and reach the process group without a second operation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch._C._distributed_c10d import ProcessGroup, Work, _resolve_process_group

from shardwise.collective import Collective, Group
from shardwise.parallel.mesh import Mesh
from shardwise.parallel.pipeline.executor import goes_back
from shardwise.predict.profile.op_counter import tensors

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
"""Operation of `c10d` -> (operation of `Collective`, index of the argument whose tensors are the message).

The index is None if there is no message.
"""

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
"""Operation of `_c10d_functional` -> (operation of `Collective`, whether the message is the result).

Otherwise the message is the first argument.
"""

_SILENT = {"wait_tensor", "check_for_nan", "monitored_barrier_"}


class UnknownCollective(NotImplementedError):
    """A process group ran an operation that `collective_of` does not know."""


@dataclass(frozen=True, slots=True)
class Axes:
    """The ranks that differ from this one along each axis of a strategy.

    Attributes:
        members: (axis, global ranks), innermost axis first; the last is `world` with all ranks. Empty if the axes are
            unknown.
    """

    members: tuple[tuple[str, frozenset[int]], ...]

    @classmethod
    def of(cls, mesh: Mesh | None) -> Axes:
        """Return the axes of a worker's mesh. Returns empty axes if there is no mesh or it has no grid."""
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
        """Return the innermost axis that contains all `ranks`. Returns an empty string if there is none."""
        return next((axis for axis, members in self.members if members.issuperset(ranks)), "")


def is_collective(operation: Any) -> bool:
    """Return whether the dispatcher's `operation` belongs to a process group."""
    return operation.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")


def work_of(result: Any) -> Work | None:
    """Return the handle in the result of a collective of `c10d`. Returns None if there is none (functional ones)."""
    last = result[-1] if isinstance(result, (tuple, list)) and result else result
    return Work.unbox(last) if isinstance(last, torch.ScriptObject) else None


def collective_of(
    operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, axes: Axes, when: str
) -> Collective | None:
    """Return the collective that a call of `operation` issues. Returns None if the call only waits or checks.

    Args:
        operation: overload that the dispatcher calls, see `is_collective`.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        result: result of the call.
        axes: axes of this rank, to name the axis of the group.
        when: phase of the step for `Collective.when`; for send and recv the tag of the message decides instead.

    Raises:
        UnknownCollective: The operation is not in the tables of this module.
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
        when = "backward" if goes_back(given["tag"]) else "forward"  # a receive is posted before the pass that needs it
    size = sum(tensor.numel() * tensor.element_size() for tensor in tensors(moved))
    tag = given["tag"] if kind in ("send", "recv") else 0
    axis = axes.members[-1][0] if when == "report" and axes.members else axes.name(ranks)
    return Collective(kind, size, Group.of(ranks), axis, when, asynchronous, tag)
