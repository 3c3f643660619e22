"""Backend of torch.distributed for the process groups of a worker, and what a group communicates by."""

from __future__ import annotations

from shardwise.launch.shared_memory.choice import GLOO, NCCL, transport


def backend() -> str:
    """Return the backend of torch.distributed for the groups of this process. Raises RequestError, see `transport`."""
    import torch

    if torch.cuda.is_available():
        return "cpu:gloo,cuda:nccl"
    if transport() == GLOO:
        return GLOO
    from shardwise.launch.shared_memory.registration import register

    return register()


def used() -> str | None:
    """Return what the group of all workers communicates by: NCCL, SHM, LAYERED or GLOO. None for a single worker."""
    import torch
    import torch.distributed as dist

    if not dist.is_initialized() or dist.get_world_size() == 1:
        return None
    if torch.cuda.is_available():
        return NCCL
    from shardwise.launch.shared_memory.process_group import SharedMemoryGroup

    group = dist.group.WORLD
    return group.transport if isinstance(group, SharedMemoryGroup) else GLOO
