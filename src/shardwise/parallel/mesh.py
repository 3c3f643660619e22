"""Where this worker stands among all of them: its coordinate and its process group along every axis.

For dp=2,tp=2: rank 0: dp 0, tp 0    rank 1: dp 0, tp 1    rank 2: dp 1, tp 0    rank 3: dp 1, tp 1
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from shardwise.strategy import Strategy

Allocating = Callable[[], AbstractContextManager[Any]]


@dataclass(frozen=True, slots=True)
class Mesh:
    """The workers of a strategy as a grid with the axes dp, fsdp, pp, tp, in the strategy's order.

    Attributes:
        strategy: its degrees are the sizes of the grid.
        device: where this worker computes.
        rank: this worker's number.
        grid: torch's device mesh; None for one worker, which needs no process group.
    """

    strategy: Strategy
    device: torch.device
    rank: int
    grid: DeviceMesh | None
    replicas: DeviceMesh | None = None
    """dp and fsdp flattened into one axis, where both are used."""
    allocating: Allocating = nullcontext
    """Surrounds what takes memory for parameters and for buckets of gradients: a dry run takes none."""

    @classmethod
    def build(
        cls, strategy: Strategy, device: torch.device | None = None, allocating: Allocating = nullcontext
    ) -> Mesh:
        """The mesh of the default process group, whose size must be `strategy.workers` (StrategyError)."""
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
        """This worker's place along `axis`."""
        return 0 if self.grid is None else self.grid.get_local_rank(axis)

    def group(self, axis: str) -> dist.ProcessGroup | None:
        """The workers that differ from this one in `axis` only; None where that is this worker alone."""
        if self.grid is None or getattr(self.strategy, axis) == 1:
            return None
        return self.grid.get_group(axis)

    @property
    def replica(self) -> int:
        """Which share of the batch this worker computes: 0 to strategy.replicas - 1."""
        return self.coordinate("dp") * self.strategy.fsdp + self.coordinate("fsdp")

    @property
    def replica_group(self) -> dist.ProcessGroup | None:
        """The workers that hold the same part of the model and compute other shares of the batch; None: this alone."""
        if self.replicas is not None:
            return self.replicas.get_group()
        return self.group("dp") or self.group("fsdp")

    @property
    def home(self) -> torch.device:
        """Where what `fsdp` splits is kept."""
        return torch.device("cpu") if self.strategy.offload else self.device

    @property
    def world(self) -> dist.ProcessGroup | None:
        """All workers; None where this is the only one."""
        return None if self.strategy.workers == 1 else dist.group.WORLD


def default_device() -> torch.device:
    """The accelerator of this worker's local rank where there is one, else the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def forget_meshes() -> None:
    """Makes DTensor forget all meshes, for a process whose groups are gone and which will have others.

    What it remembers by mesh holds the groups, and each group of gloo three threads that poll.
    """
    from torch.distributed.tensor import _collective_utils, _redistribute, debug

    for forget in (
        lambda: debug._clear_sharding_prop_cache(),  # type: ignore[no-untyped-call]
        lambda: debug._clear_fast_path_sharding_prop_cache(),  # type: ignore[no-untyped-call]
        lambda: _redistribute.clear_redistribute_planner_cache(),
        lambda: _redistribute._gen_transform_infos.cache_clear(),
        lambda: _collective_utils.MeshTopoInfo.build_from_mesh.cache_clear(),
    ):
        with suppress(AttributeError):  # not every version of torch has all of them
            forget()
