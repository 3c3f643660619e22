"""Registration of the backend whose groups share memory with torch.distributed, and its choice of a group's class."""

from __future__ import annotations

import logging
from datetime import timedelta
from functools import partial
from typing import Any

import torch.distributed as dist
from torch.distributed import PrefixStore  # type: ignore[attr-defined]

from shardwise.launch.shared_memory.choice import SHM
from shardwise.launch.shared_memory.layered_group import LayeredGroup
from shardwise.launch.shared_memory.neighbours import Met, meet
from shardwise.launch.shared_memory.process_group import SharedMemoryGroup


def register() -> str:
    """Register the backend with torch.distributed, and return its name."""
    if SHM not in dist.Backend.backend_list:
        dist.Backend.register_backend(SHM, _create, devices=["cpu"])
    return SHM


def _create(store: Any, rank: int, count: int, timeout: timedelta) -> Any:
    """Create a group that shares memory within each host; one of gloo if its workers cannot or need not. Collective."""
    met = meet(store, rank, count, timeout.total_seconds())
    if isinstance(met, Met) and len(met.hosts) == 1:
        return SharedMemoryGroup(met.neighbours, rank, count)
    gloo = partial(_gloo, store, timeout)
    if isinstance(met, Met):
        return LayeredGroup(met, rank, count, gloo)
    if met and rank == 0:
        logging.getLogger("shardwise").warning("workers use gloo instead of shared memory, which is slower: %s", met)
    return gloo("gloo", rank, count)


def _gloo(store: Any, timeout: timedelta, name: str, rank: int, count: int) -> Any:
    """Create a group of gloo. Collective over its workers, which give it the same name."""
    group = dist.ProcessGroupGloo(PrefixStore(name, store), rank, count, timeout=timeout)
    group._set_sequence_number_for_group()
    return group
