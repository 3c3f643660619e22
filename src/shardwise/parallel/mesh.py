"""This worker's position among all workers: its coordinate and its process group along every axis.

For dp=2,tp=2: rank 0: dp 0, tp 0    rank 1: dp 0, tp 1    rank 2: dp 1, tp 0    rank 3: dp 1, tp 1
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.strategy import Strategy

Allocating = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Mesh:
    """Grid of a strategy's workers with the axes dp, fsdp, pp, tp, in the strategy's order.

    Attributes:
        strategy: its degrees are the sizes of the grid.
        device: the device that this worker computes on.
        rank: this worker's global rank.
        grid: torch's device mesh. None for a single worker, which needs no process group.
    """

    strategy: Strategy
    device: torch.device
    rank: int
    grid: DeviceMesh | None
    replicas: DeviceMesh | None = None
    """Axes dp and fsdp flattened into one, if both are used."""
    allocating: Allocating = nullcontext
    """Context manager around every allocation of parameters and gradient buckets; a dry run allocates nothing in it."""
    whole: Mesh | None = None
    """Mesh of all workers, if this one is of those that take local steps together; see `of_replica`."""
    together: dist.ProcessGroup | None = None
    """Group of the workers of this mesh if they are not all; None for a single one."""

    @classmethod
    def build(
        cls, strategy: Strategy, device: torch.device | None = None, allocating: Allocating = nullcontext
    ) -> Mesh:
        """Build the mesh of the default process group.

        Raises:
            StrategyError: the group's size is not `strategy.workers`.
        """
        device = device or default_device()
        if strategy.workers == 1 and not dist.is_initialized():
            return cls(strategy, device, 0, None, allocating=allocating)
        strategy.check_workers(dist.get_world_size())
        degrees = tuple(getattr(strategy, axis) for axis in strategy.axes)
        grid = init_device_mesh(device.type, degrees, mesh_dim_names=strategy.axes)
        both = strategy.dp > 1 and strategy.fsdp > 1
        replicas = grid["dp", "fsdp"]._flatten("replicas") if both else None
        return cls(strategy, device, dist.get_rank(), grid, replicas, allocating)

    def coordinate(self, axis: str) -> int:
        """Return this worker's index along `axis`; 0 without a grid, and along axes of one worker."""
        return 0 if self.grid is None or getattr(self.strategy, axis) == 1 else self.grid.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """Return the group of workers that differ from this one in `axis` only.

        Returns None if that is this worker alone.
        """
        if self.grid is None or getattr(self.strategy, axis) == 1:
            return None
        return self.grid.get_group(axis)

    @property
    def replica(self) -> int:
        """Return the index of this worker's share of the batch, from 0 to strategy.replicas - 1."""
        return self.coordinate("dp") * self.strategy.fsdp + self.coordinate("fsdp")

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """Return the group of workers that hold the same part of the model and compute other shares of the batch.

        Workers that shard that part with fsdp belong to the group too. Returns None if that is this worker alone.
        """
        if self.replicas is not None:
            return self.replicas.get_group()
        return self.group("dp") or self.group("fsdp")

    def of_replica(self) -> Mesh:
        """Return the mesh of the workers that take local steps together: those with our index along dp. Collective.

        Its strategy has dp=1, its axes and groups are those of this mesh. Without `local` it is this mesh itself.
        """
        if not self.strategy.local or self.grid is None:
            return self
        strategy = self.strategy.of_replica(self.coordinate("dp"))
        axes = tuple(axis for axis in self.strategy.axes if axis != "dp" and getattr(strategy, axis) > 1)
        together = None
        if axes:
            together = self.grid[axes]._flatten("together").get_group() if axes[1:] else self.grid.get_group(axes[0])
        return replace(self, strategy=strategy, replicas=None, whole=self, together=together)

    def new_replica_group(self) -> dist.ProcessGroup:
        """Create another group of the workers of `replica_group`, which has some. Collective over them."""
        assert self.replica_group is not None
        if self.whole is None:
            return dist.new_group()  # type: ignore[no-any-return]
        ranks = dist.get_process_group_ranks(self.replica_group)
        return dist.new_group(ranks, use_local_synchronization=True)  # type: ignore[no-any-return]

    def parts_group(self) -> dist.ProcessGroup | None:
        """Return the group of workers that together hold the parts of each parameter that `fsdp` or `tp` cuts.

        Returns None if neither does. Collective over all workers.
        """
        cut = {"fsdp": self.strategy.splits_parameters, "tp": self.strategy.tp > 1}
        axes = tuple(axis for axis in self.strategy.axes if cut.get(axis))
        if self.grid is None or not axes:
            return None
        return self.group(axes[0]) if len(axes) == 1 else self.grid[axes]._flatten("parts").get_group()

    @property
    def home(self) -> torch.device:
        """Return the device of the parameters that `fsdp` shards: the CPU with offloading, else the compute device."""
        return torch.device("cpu") if self.strategy.offload else self.device

    @property
    def world(self) -> dist.ProcessGroup | None:
        """Return the group of all workers of this mesh. Returns None if this is the only one."""
        if self.strategy.workers == 1:
            return None
        return dist.group.WORLD if self.whole is None else self.together


def default_device() -> torch.device:
    """Return this process's current CUDA device if there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def random_state_kept() -> AbstractContextManager[Any]:
    """Restore torch's random state after the block: that of the CPU, and of this process's GPU if it has used it.

    By default torch restores that of every GPU of the host, and initializes and warns of them.
    """
    used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.random.fork_rng(devices=[torch.cuda.current_device()] if used else [])


def forget_meshes() -> None:
    """Clear DTensor's caches of meshes, for a process whose groups are destroyed and which will create others.

    The caches keep the groups alive, and every gloo group runs three threads that poll.
    """
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    for forget in (
        lambda: debug._clear_sharding_prop_cache(),  # type: ignore[no-untyped-call]
        lambda: debug._clear_fast_path_sharding_prop_cache(),  # type: ignore[no-untyped-call]
        lambda: _redistribute.clear_redistribute_planner_cache(),
        lambda: _redistribute._gen_transform_infos.cache_clear(),
        lambda: _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear(),
    ):
        with suppress(AttributeError):  # not every version of torch has all of these caches
            forget()
