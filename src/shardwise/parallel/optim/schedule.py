"""Learning-rate schedule of a workload: when it moves, and its counts in checkpoints."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim.lr_scheduler import LRScheduler

from shardwise.errors import CheckpointError, WorkloadError
from shardwise.parallel.optim.changed_numbers import MADE, apply_changes, check_schedule
from shardwise.parallel.optim.making import required
from shardwise.workload.workload import Workload


class Schedule:
    """Scheduler of a workload over its optimizer, stepped as `Workload.schedule_every` says.

    Attributes:
        scheduler: the scheduler. None without a schedule.

    Raises:
        WorkloadError: the scheduler needs a metric and is not to get one, or is to get one and takes none.
    """

    def __init__(self, workload: Workload, optimizer: torch.optim.Optimizer) -> None:
        self._workload = workload
        self.scheduler: LRScheduler | None = None
        if workload.schedule is not None:
            self.scheduler = workload.schedule(optimizer)
            self._check(type(self.scheduler))

    def _check(self, kind: Any) -> None:
        workload, every = self._workload, self._workload.schedule_every
        needed = required(kind.step)
        arguments = list(inspect.signature(kind.step).parameters)[1:]
        if needed and every != "metric":
            raise WorkloadError(
                f"{kind.__name__}, the schedule of workload {workload.name!r}, needs {needed[0]!r} at each step, and "
                f"schedule_every={every!r} gives it none: use schedule_every='metric', with an evaluation"
            )
        if every == "metric" and (not arguments or arguments[0] == "epoch"):
            raise WorkloadError(
                f"schedule_every='metric' of workload {workload.name!r}: {kind.__name__} takes no metric, use "
                "schedule_every='epoch' or 'step'"
            )

    def after_step(self) -> None:
        """Move the schedule after an optimizer step, if that is when it moves."""
        if self.scheduler is not None and self._workload.schedule_every == "step":
            self.scheduler.step()

    def after_epoch(self, values: Mapping[str, float | None]) -> None:
        """Move the schedule after an epoch, if that is when it moves.

        Args:
            values: what the evaluation after the epoch gave, by name. Required if the schedule follows a metric.

        Raises:
            WorkloadError: the schedule follows a metric, and the workload has no evaluation.
        """
        if self.scheduler is None or self._workload.schedule_every == "step":
            return
        if self._workload.schedule_every == "epoch":
            self.scheduler.step()
            return
        value = values[self.followed]
        follow: Any = self.scheduler.step
        follow(float("nan") if value is None else value)

    @property
    def followed(self) -> str:
        """Return the name of the value that the schedule follows: the first evaluation's metric, or its loss.

        A scheduler that looks for a minimum (torch's default) follows the loss if a larger metric is better.

        Raises:
            WorkloadError: there is no evaluation, or the scheduler looks for a maximum of what is to fall.
        """
        workload = self._workload
        if not workload.evaluations:
            raise WorkloadError(
                f"schedule_every='metric' of workload {workload.name!r} follows the evaluation, and it has none: give "
                "one, or use schedule_every='epoch'"
            )
        evaluation = workload.evaluations[0]
        rises = getattr(self.scheduler, "mode", "min") == "max"
        if rises and not evaluation.higher_is_better:
            raise WorkloadError(
                f"the schedule of workload {workload.name!r} has mode='max', and a smaller {evaluation.metric} is "
                "better: use mode='min'"
            )
        return evaluation.metric if rises == evaluation.higher_is_better else "loss"


def note_step(optimizer: torch.optim.Optimizer) -> None:
    """Note that an optimizer has taken a step that torch has not seen: elsewhere, before a resume, or one to come.

    torch warns of a schedule that moves before the first step. Its schedulers look at this attribute of an optimizer,
    which no public function of torch sets.
    """
    made: Any = optimizer
    made._opt_called = True


def schedule_state(optimizer: torch.optim.Optimizer, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Return the scheduler's counters and the numbers of the optimizer's groups (learning rates, ...), JSON-able."""
    groups = optimizer.param_groups
    return {
        "groups": [plain({key: value for key, value in group.items() if key != "params"}) for group in groups],
        "scheduler": None if scheduler is None else plain(scheduler.state_dict()),
    }


def load_schedule_state(
    optimizer: torch.optim.Optimizer,
    scheduler: LRScheduler | None,
    state: Mapping[str, Any],
    made: Mapping[str, Any] | None = None,
) -> None:
    """Restore the numbers of groups and scheduler; those that the workload makes otherwise than before are new.

    Args:
        optimizer: the optimizer.
        scheduler: scheduler of its learning rate.
        state: result of `with_made`.
        made: result of `schedule_state` before the first step. None means that no step was taken.

    Raises:
        CheckpointError: the number of parameter groups differs, a value does not belong to the scheduler or optimizer,
            or a change of the workload does not fit the schedule.
    """
    made = made or schedule_state(optimizer, scheduler)
    check_schedule(scheduler, state["scheduler"], made)
    if scheduler is not None:
        known = scheduler.state_dict()
        saved = {key: value for key, value in state["scheduler"].items() if key != MADE}
        for key in saved:
            if key not in known and hasattr(scheduler, key):  # a method, or an object that it refers to
                raise CheckpointError(f"the checkpoint has {key!r} among the counts of the scheduler, which is none")
        scheduler.load_state_dict(_like(known, saved))
    groups = _fitted(list(state["groups"]), len(optimizer.param_groups))
    if len(groups) != len(optimizer.param_groups):
        raise CheckpointError(
            f"the checkpoint has {len(groups)} parameter groups, the workload's optimizer makes "
            f"{len(optimizer.param_groups)}: use an optimizer function that makes the same groups for any parameters"
        )
    for group, saved in zip(optimizer.param_groups, groups, strict=True):
        for key, value in saved.items():
            if isinstance(group.get(key), Tensor):
                group[key].fill_(value)
            elif key in group:
                group[key] = _like(group[key], value)
    if len(groups) == len(state["groups"]):  # else the groups cannot be compared one by one
        apply_changes(optimizer.param_groups, groups, made["groups"], scheduler)


def _fitted(values: list[Any], count: int) -> list[Any]:
    """Repeat `values` to `count` of them if all are equal.

    Checkpoints of earlier versions may have fewer groups, of a worker with few parameters.
    """
    if values and len(values) != count and all(value == values[0] for value in values):
        return values[:1] * count
    return values


_UNKNOWN = object()


def plain(value: Any) -> Any:
    """Return the part of a value that JSON can hold: None, numbers, strings, and lists and dicts of them."""
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.item()
    if isinstance(value, Mapping):
        known = {str(key): plain(item) for key, item in value.items()}
        return {key: item for key, item in known.items() if item is not _UNKNOWN}
    if isinstance(value, (list, tuple)):
        return [None if (item := plain(entry)) is _UNKNOWN else item for entry in value]
    return _UNKNOWN


def _like(model: Any, value: Any) -> Any:
    """Convert a plain value to the types of `model`.

    JSON has neither tuples nor number keys. Entries that JSON left out keep their value in `model`.
    """
    if isinstance(model, Mapping) and isinstance(value, Mapping):
        names = {str(key): key for key in model}
        restored = {names.get(key, key): _like(model.get(names.get(key, key)), item) for key, item in value.items()}
        return type(model)({**model, **restored})  # type: ignore[call-arg]
    if isinstance(model, (list, tuple)) and isinstance(value, list):
        value = _fitted(value, len(model))
        if isinstance(model, tuple) and len(model) != len(value):
            raise CheckpointError(f"the checkpoint has {len(value)} values where the optimizer has {model}")
        if len(model) != len(value):
            return type(model)(value)
        return type(model)(_like(old, new) for old, new in zip(model, value, strict=True))
    if isinstance(model, Tensor):
        return torch.full_like(model, value)
    return model if value is None and callable(model) else value
