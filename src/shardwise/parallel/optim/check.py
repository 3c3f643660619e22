"""Check of a workload's optimizer and schedule before any worker starts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch import nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.optim.eight_bit import check_states
from shardwise.parallel.optim.making import make_optimizer
from shardwise.parallel.optim.schedule import Schedule
from shardwise.parallel.optim.served import too_many_servers
from shardwise.parallel.optim.update import settled_nature
from shardwise.parallel.state.build_model import trained_of
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def check_optimizer(workload: Workload, strategy: Strategy, model: nn.Module) -> None:
    """Check that the optimizer and the schedule of a workload can train a model under a strategy.

    Args:
        workload: the workload.
        strategy: its strategy.
        model: its plain module; the parameters need no values.

    Raises:
        WorkloadError, StrategyError: as `ParameterUpdate` would on the workers.
    """
    trained = trained_of(model)
    if not trained:
        return  # the workers refuse the model
    with _quickly_made():
        try:
            optimizer = make_optimizer(workload, trained)
            schedule = Schedule(workload, optimizer)
            if strategy.ps > len(trained):
                raise StrategyError(too_many_servers(strategy, len(trained)))
            if strategy.states:
                check_states(optimizer, workload.name)
            if not torch.cuda.is_available():  # it may work on a GPU only, where the workers try it
                settled_nature(workload, strategy, trained, torch.device("cpu"))
        except WorkloadError as error:
            if error.__cause__ is None or strategy.workers > strategy.dp or strategy.ps:
                raise
            return  # its function looks at the values of parameters, which are whole on each worker
    if workload.schedule_every == "metric":
        _ = schedule.followed


@contextmanager
def _quickly_made() -> Iterator[None]:
    """Keep torch from importing its compiler, which takes more than a second, to make an optimizer."""
    kind: Any = torch.optim.Optimizer
    plain = getattr(kind.add_param_group, "__wrapped__", kind.add_param_group)
    with mock.patch.object(kind, "add_param_group", plain):
        yield
