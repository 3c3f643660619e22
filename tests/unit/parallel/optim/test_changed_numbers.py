"""Numbers of an optimizer that the user changes before a training is resumed hold, or are refused in one line."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler
from torch.utils.data import TensorDataset

from shardwise.errors import CheckpointError
from shardwise.parallel.program import Program
from shardwise.strategy import Strategy
from shardwise.workload.workload import Evaluation, Workload

BATCH = [torch.ones(4, 3)]


def workload(schedule: Any = None, **options: Any) -> Workload:
    return Workload(
        name="rates",
        model=lambda: nn.Linear(3, 1),
        dataset=TensorDataset(*BATCH),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: output.square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, **{"lr": 0.1, **options}),
        schedule=schedule,
        batch_size=4,
    )


def resumed(before: Workload, after: Workload, steps: int = 2) -> Program:
    first = Program.build(before, Strategy())
    for _ in range(steps):
        first.step(BATCH)
    program = Program.build(after, Strategy())
    program.load_state(json.loads(json.dumps(first.state())))
    return program


def rate(program: Program) -> float:
    assert program.optimizer is not None
    found: float = program.optimizer.param_groups[0]["lr"]
    return found


def halving(optimizer: torch.optim.Optimizer) -> Any:
    return lr_scheduler.StepLR(optimizer, 1, 0.5)


def test_a_new_learning_rate_holds() -> None:
    assert rate(resumed(workload(), workload(lr=0.03))) == 0.03


def test_what_is_not_changed_goes_on() -> None:
    assert rate(resumed(workload(halving), workload(halving))) == pytest.approx(0.025)


def test_other_numbers_hold_too() -> None:
    program = resumed(workload(weight_decay=0.1), workload(weight_decay=0.5, momentum=0.9))
    assert program.optimizer is not None
    group = program.optimizer.param_groups[0]
    assert (group["weight_decay"], group["momentum"]) == (0.5, 0.9)


@pytest.mark.parametrize(
    "schedule", [halving, lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)]
)
def test_a_new_rate_goes_through_the_schedule(schedule: Callable[..., Any]) -> None:
    program = resumed(workload(schedule), workload(schedule, lr=0.8))
    assert rate(program) == pytest.approx(0.2)
    program.step(BATCH)
    assert rate(program) == pytest.approx(0.1)


def test_a_change_holds_after_a_second_resume() -> None:
    first = resumed(workload(halving), workload(halving, lr=0.8))
    second = Program.build(workload(halving, lr=0.8), Strategy())
    second.load_state(json.loads(json.dumps(first.state())))
    assert rate(second) == pytest.approx(0.2)


def test_each_of_several_optimizers_takes_its_own_change() -> None:
    def both(first: float) -> Workload:
        def optimizers(parameters: Any) -> list[torch.optim.Optimizer]:
            weight, bias = parameters
            return [torch.optim.AdamW([weight], lr=first), torch.optim.SGD([bias], lr=0.5)]

        return replace(workload(halving), optimizer=optimizers)

    program = resumed(both(0.1), both(0.4))
    assert [group["lr"] for group in program.optimizer.param_groups] == pytest.approx([0.1, 0.125])


def test_a_schedule_that_follows_a_metric_goes_on() -> None:
    made = replace(
        workload(lambda optimizer: lr_scheduler.ReduceLROnPlateau(optimizer, patience=3)),
        schedule_every="metric",
        evaluation=Evaluation(dataset=TensorDataset(*BATCH), metric="size", measure=lambda output, _: output.mean()),
    )
    assert rate(resumed(made, made)) == 0.1


def test_functions_of_a_schedule_may_change() -> None:
    def schedule(factor: float) -> Any:
        return lambda optimizer: lr_scheduler.LambdaLR(optimizer, lambda step: factor**step)

    assert rate(resumed(workload(schedule(0.5)), workload(schedule(0.1)))) == pytest.approx(0.001)


@pytest.mark.parametrize(
    ("before", "after", "match"),
    [
        (
            workload(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9)),
            workload(lambda optimizer: lr_scheduler.CosineAnnealingLR(optimizer, 9), lr=0.3),
            "was 0.1 .* here it is 0.3, but the schedule CosineAnnealingLR cannot",
        ),
        (
            workload(lambda optimizer: lr_scheduler.SequentialLR(optimizer, [halving(optimizer)], [])),
            workload(lambda optimizer: lr_scheduler.SequentialLR(optimizer, [halving(optimizer)], []), lr=0.3),
            "was 0.1 .* here it is 0.3, but the schedule SequentialLR cannot",
        ),
        (workload(halving), workload(lambda o: lr_scheduler.StepLR(o, 2, 0.5)), "step_size of the schedule was 1"),
        (workload(), workload(halving), "of a training with no schedule of the learning rate, here there is one"),
        (workload(halving), workload(), "of a training with a schedule of the learning rate, here there is none"),
    ],
)
def test_a_change_that_does_not_fit_is_refused(before: Workload, after: Workload, match: str) -> None:
    with pytest.raises(CheckpointError, match=match) as raised:
        resumed(before, after)
    assert "\n" not in str(raised.value)


def test_a_checkpoint_of_an_earlier_version_goes_on() -> None:
    program = Program.build(replace(workload(halving), seed=1), Strategy())
    state = {
        "steps": 2,
        "groups": [{"lr": 0.025, "initial_lr": 0.1}],
        "scheduler": {"last_epoch": 2, "_last_lr": [0.025]},
    }
    program.load_state(state)
    assert rate(program) == 0.025
