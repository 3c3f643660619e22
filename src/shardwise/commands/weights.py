"""Plain modules filled with trained weights."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.launch.context import under_launcher
from shardwise.parallel.mesh import random_state_kept
from shardwise.parallel.state.materialize import materialize
from shardwise.workload.losses import without_loss
from shardwise.workload.workload import Workload


def filled_model(workload: Workload, weights: dict[str, Tensor] | None) -> nn.Module:
    """Build the workload's module on the CPU with `weights`; under an outer launcher, all workers get rank 0's."""
    with random_state_kept():
        torch.manual_seed(workload.seed)
        model = workload.model()
    if weights is not None:
        materialize(model, torch.device("cpu"))
        model.load_state_dict(without_loss(weights))
    if under_launcher() and dist.is_initialized():
        for tensor in model.state_dict().values():  # these tensors share their memory with the module
            dist.broadcast(tensor, src=0)
    return model
