"""Turns of a training step on a plain module: in each, all parameters but its own are constants."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from collections.abc import Set as AbstractSet
from contextlib import contextmanager
from dataclasses import replace

from torch import nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.state.build_model import frozen_later
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def check_turns(workload: Workload, strategy: Strategy) -> None:
    """Check that a strategy can take the turns of a workload's step, if it has any. Raises StrategyError."""
    if workload.turns and (not strategy.runs_module or strategy.fsdp > 1 or strategy.recomputes):
        raise StrategyError(
            f"{strategy}: turns of a step train with dp alone, each worker with the whole model and all of its "
            f"activations: use dp={strategy.workers}"
            if strategy.workers > 1
            else f"{strategy}: turns of a step train without recomputation and with the module as it is: use single"
        )


def by_turn(workload: Workload) -> tuple[Workload, ...]:
    """Return a workload for each turn, with its function as the step; the workload itself if it has no turns."""
    if not workload.turns:
        return (workload,)
    return tuple(
        replace(workload, name=f"{workload.name} (turn {number})", step=turn.step)
        for number, turn in enumerate(workload.turns, 1)
    )


@contextmanager
def trained_alone(parameters: Mapping[str, nn.Parameter], names: AbstractSet[str]) -> Iterator[None]:
    """Let only the parameters `names` need a gradient inside the block, of those that are trained.

    Raises:
        WorkloadError: a pass inside the block has frozen or unfrozen one itself.
    """
    others = {name: parameter for name, parameter in parameters.items() if name not in names}
    if not others:
        yield
        return
    for parameter in others.values():
        parameter.requires_grad_(False)
    try:
        yield
        changed = [name for name, parameter in parameters.items() if parameter.requires_grad == (name in others)]
        if changed:
            raise WorkloadError(frozen_later(changed[0]))
    finally:
        for parameter in others.values():
            parameter.requires_grad_(True)
