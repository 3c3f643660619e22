"""Numbers of an optimizer or schedule that the workload makes otherwise than when a checkpoint was written.

A checkpoint holds the numbers of each parameter group (learning rate, weight decay, ...) as they are, and as the
workload made them. If the workload makes another number today, the user has changed it: the new one holds. A learning
rate under a schedule is scaled, if the schedule multiplies the rate by factors that do not depend on it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.optim import lr_scheduler
from torch.optim.lr_scheduler import LRScheduler

from shardwise.errors import CheckpointError

MADE = "made"
"""Entry of a saved group or scheduler that holds its numbers as the workload made them."""

_RATES = ("lr", "initial_lr")
_COUNTERS = {"last_epoch", "_step_count", "_last_lr", "base_lrs", "_is_initial", "_get_lr_called_within_step"}
_FACTORS = (
    lr_scheduler.LambdaLR,
    lr_scheduler.MultiplicativeLR,
    lr_scheduler.StepLR,
    lr_scheduler.MultiStepLR,
    lr_scheduler.ExponentialLR,
    lr_scheduler.ConstantLR,
    lr_scheduler.LinearLR,
    lr_scheduler.PolynomialLR,
)
"""Schedules that multiply the learning rate by factors that do not depend on it."""


def with_made(now: Mapping[str, Any], made: Mapping[str, Any]) -> dict[str, Any]:
    """Return the numbers of groups and scheduler with, in each, those that the workload made."""
    groups = [{**group, MADE: first} for group, first in zip(now["groups"], made["groups"], strict=True)]
    scheduler = now["scheduler"]
    return {"groups": groups, "scheduler": scheduler and {**scheduler, MADE: made["scheduler"]}}


def check_schedule(scheduler: LRScheduler | None, saved: Any, made: Mapping[str, Any]) -> None:
    """Raise CheckpointError if there is a schedule now and there was none, or the reverse, or its numbers differ."""
    if (scheduler is None) != (saved is None):
        before, now = ("no schedule", "one") if saved is None else ("a schedule", "none")
        raise CheckpointError(
            f"the checkpoint is of a training with {before} of the learning rate, here there is {now}: keep it as it "
            "was, or start a new run from the exported weights"
        )
    first, here = _settings((saved or {}).get(MADE) or {}), _settings(made["scheduler"] or {})
    for name in first.keys() & here.keys():
        if first[name] != here[name]:
            raise CheckpointError(
                f"{name} of the schedule was {first[name]} when the checkpoint was written, here it is {here[name]}: "
                "keep it, or start a new run from the exported weights"
            )


def _settings(value: Any) -> Any:
    """Return the numbers of a scheduler, and of the schedulers in it, without those that a step changes."""
    if isinstance(value, Mapping):
        return {key: _settings(item) for key, item in value.items() if key not in _COUNTERS}
    return [_settings(item) for item in value] if isinstance(value, list) else value


def apply_changes(
    groups: Sequence[dict[str, Any]],
    saved: Sequence[Mapping[str, Any]],
    made: Sequence[Mapping[str, Any]],
    scheduler: LRScheduler | None,
) -> None:
    """Give each group the numbers that the workload makes otherwise than when the checkpoint was written.

    Args:
        groups: parameter groups of the optimizer, filled from the checkpoint.
        saved: the groups in the checkpoint.
        made: the groups as the workload makes them now.
        scheduler: schedule of the optimizer's learning rate, filled from the checkpoint.

    Raises:
        CheckpointError: the learning rate differs, and the schedule cannot be moved to another one.
    """
    for number, (group, before, now) in enumerate(zip(groups, saved, made, strict=True)):
        first = before.get(MADE) or {}
        for key in (first.keys() & now.keys() & group.keys()) - set(_RATES):
            if first[key] != now[key]:
                _set(group, key, type(group[key])(now[key]) if isinstance(now[key], list) else now[key])
        key = "initial_lr" if "initial_lr" in first and "initial_lr" in now else "lr"
        if key in first and key in now and first[key] != now[key]:
            _change_rate(group, number, (first[key], now[key]), scheduler)
    if isinstance(scheduler, lr_scheduler.LambdaLR):  # its functions may have changed, and they give the rate
        _recompute(groups, scheduler)


def _change_rate(group: dict[str, Any], number: int, rates: tuple[float, float], scheduler: LRScheduler | None) -> None:
    before, now = rates
    if scheduler is None:
        _set(group, "lr", now)
        return
    if type(scheduler) not in _FACTORS or not before:
        raise CheckpointError(
            f"the learning rate was {before:g} when the checkpoint was written, here it is {now:g}, but the schedule "
            f"{type(scheduler).__name__} cannot be moved to another one: keep {before:g}, or start a new run from the "
            "exported weights"
        )
    _set(group, "lr", float(group["lr"]) * now / before)
    _set(group, "initial_lr", now)
    scheduler.base_lrs[number] = now
    scheduler._last_lr[number] = float(group["lr"])


def _recompute(groups: Sequence[dict[str, Any]], scheduler: lr_scheduler.LambdaLR) -> None:
    for number, (group, base, factor) in enumerate(zip(groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True)):
        _set(group, "lr", base * factor(scheduler.last_epoch))
        scheduler._last_lr[number] = float(group["lr"])


def _set(group: dict[str, Any], key: str, value: Any) -> None:
    if isinstance(group[key], Tensor):
        group[key].fill_(value)
    else:
        group[key] = value
