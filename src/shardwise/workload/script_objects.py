"""Objects of a training script as fields of a workload: its optimizer, its scheduler and its data loader.

A workload has functions that make an optimizer and a scheduler on each worker. The script has made them already, over
its own module: they are made again over the parameters and the optimizer that a worker has.
"""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torch.utils.data import DataLoader, RandomSampler, SequentialSampler
from torch.utils.data.dataloader import default_collate

from shardwise.errors import WorkloadError
from shardwise.workload.loading import Loading


def optimizer_like(
    optimizer: torch.optim.Optimizer, model: nn.Module
) -> Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]:
    """Return a function that makes such an optimizer over other parameters: with the same options, groups, no state.

    Args:
        optimizer: optimizer over parameters of `model`.
        model: module whose trained parameters the function will be given others for, in their order.

    Raises:
        WorkloadError: the optimizer does not hold the trained parameters of the model.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    places = {parameter: place for place, parameter in enumerate(trained)}
    held = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if {id(parameter) for parameter in held} != {id(parameter) for parameter in trained}:
        raise WorkloadError(
            f"{type(optimizer).__name__} holds {len(held)} parameters, the model has {len(trained)} to train: it must "
            "hold exactly these"
        )
    groups = [
        ({key: value for key, value in group.items() if key != "params"}, [places[each] for each in group["params"]])
        for group in optimizer.param_groups
    ]

    def make(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
        given = list(parameters)
        made = object.__new__(type(optimizer))
        made.__dict__.update({key: value for key, value in vars(optimizer).items() if key != "step"})
        made.state = defaultdict(dict)
        if len(given) != len(trained):  # a prediction counts the kernels of a few parameters
            made.param_groups = [{**copy.deepcopy(groups[0][0]), "params": given}]
        else:
            made.param_groups = [
                {**copy.deepcopy(options), "params": [given[place] for place in members]} for options, members in groups
            ]
        return made

    return make


def schedule_like(
    scheduler: LRScheduler, optimizer: torch.optim.Optimizer
) -> Callable[[torch.optim.Optimizer], LRScheduler]:
    """Return a function that makes such a scheduler over another optimizer with the same groups.

    Args:
        scheduler: scheduler that has not been stepped.
        optimizer: its optimizer.
    """

    def make(other: torch.optim.Optimizer) -> LRScheduler:
        if isinstance(scheduler, LRScheduler):
            LambdaLR(other, lambda _: 1.0)  # torch's mark on `step`, by which schedulers notice a wrong order of calls
        made = copy.deepcopy(scheduler, {id(optimizer): other})
        for group, known in zip(other.param_groups, optimizer.param_groups, strict=True):
            group.update({key: copy.deepcopy(known[key]) for key in ("initial_lr", "lr") if key in known})
        return made

    return make


def loader_fields(loader: DataLoader[Any]) -> dict[str, Any]:
    """Return the fields of a workload that say what a data loader does: dataset, batch size, collate, loading.

    Raises:
        WorkloadError: the loader has no batch size, or an order of its own that a workload needs as a sampler.
    """
    if loader.batch_size is None:
        raise WorkloadError(
            "the DataLoader has a batch sampler of its own: write a Workload with Loading(batch_sampler=...)"
        )
    kinds = (RandomSampler, SequentialSampler)
    sampler = (
        None if isinstance(loader.sampler, kinds) or not hasattr(loader.dataset, "__getitem__") else loader.sampler
    )
    return {
        "dataset": loader.dataset,
        "batch_size": loader.batch_size,
        "collate": None if loader.collate_fn is default_collate else loader.collate_fn,
        "loading": Loading(
            shuffle=isinstance(loader.sampler, RandomSampler),
            drop_last=loader.drop_last,
            sampler=sampler,
            processes=min(loader.num_workers, 1),
        ),
    }
