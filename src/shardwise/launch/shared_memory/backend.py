"""Backend of torch.distributed for the process groups of a worker."""

from __future__ import annotations

from shardwise.launch.shared_memory.choice import GLOO, transport


def backend() -> str:
    """Return the backend of torch.distributed for the groups of this process. Raises RequestError, see `transport`."""
    import torch

    if torch.cuda.is_available():
        return "cpu:gloo,cuda:nccl"
    if transport() == GLOO:
        return GLOO
    from shardwise.launch.shared_memory.process_group import register

    return register()
