"""Objects of an Accelerate script as a workload: what it hands to `accelerator.prepare`, and the loss of its loop."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from shardwise.workload.script_objects import loader_fields, optimizer_like, schedule_like
from shardwise.workload.workload import Workload


def workload(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    loader: DataLoader[Any],
    step: Callable[[Any, Any], Tensor],
    *,
    scheduler: torch.optim.lr_scheduler.LRScheduler | None = None,
    processes: int = 1,
    gradient_accumulation_steps: int = 1,
    name: str = "",
    **fields: Any,
) -> Workload:
    """Return the workload of the objects that a script would give to `accelerator.prepare`.

    Args:
        model: the module, before `prepare`; copies of it are trained.
        optimizer: its optimizer, which has not stepped.
        loader: loader of the training data.
        step: function of (model, batch) that returns the loss: what stands before `accelerator.backward`.
        scheduler: scheduler of the optimizer, stepped after each update.
        processes: processes that the script was started with; each has batches of the loader's size.
        gradient_accumulation_steps: batches of each process in an update.
        name: name in runs and reports; by default the class of the model.
        fields: further fields of `Workload`, such as `clip_norm` for `accelerator.clip_grad_norm_`, `precision`,
            `epochs`, `evaluation`. They take precedence.

    Raises:
        WorkloadError: the optimizer does not hold the model's parameters, or the loader cannot be taken over.
    """
    made = loader_fields(loader)
    made["batch_size"] *= processes * gradient_accumulation_steps
    if scheduler is not None:
        made["schedule"] = schedule_like(scheduler, optimizer)
    return Workload(
        **{
            "name": name or type(model).__name__,
            "model": lambda: copy.deepcopy(model),
            "optimizer": optimizer_like(optimizer, model),
            "step": step,
            **made,
            **fields,
        }
    )
