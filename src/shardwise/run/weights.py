"""Trained weights back in a plain module."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.launch.context import under_launcher
from shardwise.parallel.materialize import materialize
from shardwise.workload.workload import Workload


def filled_model(workload: Workload, weights: dict[str, Tensor] | None) -> nn.Module:
    """The workload's module, on the CPU, with `weights`; under an outer launcher those of rank 0, on all workers."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(workload.seed)
        model = workload.model()
    if weights is not None:
        materialize(model, torch.device("cpu"))
        model.load_state_dict(weights)
    if under_launcher() and dist.is_initialized():
        for tensor in model.state_dict().values():  # they share their memory with the module
            dist.broadcast(tensor, src=0)
    return model
