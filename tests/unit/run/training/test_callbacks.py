"""Objects that are told of each step and each evaluation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from test_evaluating import STEPS, made, of, trained

from shardwise.errors import WorkloadError
from shardwise.run.training.result import Step


class Logger:
    def __init__(self) -> None:
        self.told: list[Any] = []

    def on_step(self, step: Step) -> None:
        self.told.append((step.step, step.loss))

    def on_evaluation(self, step: int, values: dict[str, float]) -> None:
        self.told.append((step, values))


class Steps:
    def __init__(self) -> None:
        self.epochs: list[int] = []

    def on_step(self, step: Step) -> None:
        self.epochs.append(step.epoch)


def test_each_is_told_what_it_has_a_method_for(tmp_path: Path) -> None:
    logger, steps = Logger(), Steps()
    result = trained(made(of([0.25, 0.5]), callbacks=[logger, steps]), tmp_path / "run")
    assert steps.epochs == [0] * STEPS + [1] * STEPS
    assert logger.told == [
        *((step.step, step.loss) for step in result.steps[:STEPS]),
        (STEPS, result.evaluations[STEPS]),
        *((step.step, step.loss) for step in result.steps[STEPS:]),
        (2 * STEPS, result.evaluations[2 * STEPS]),
    ]


class Failing:
    def on_step(self, step: Step) -> None:
        if step.step == 3:
            raise OSError("no route to the tracker")


def test_one_that_fails_ends_the_run_in_one_line() -> None:
    said = "callback Failing of workload 'small' fails in on_step after step 3: OSError: no route to the tracker"
    with pytest.raises(WorkloadError, match=said):
        trained(made(callbacks=(Failing(),)))


@pytest.mark.parametrize(
    ("callbacks", "said"),
    [
        ([object()], "callback object has none of the methods on_step, on_evaluation"),
        (Logger(), "callbacks must be a list of objects"),
        ("on_step", "callbacks must be a list of objects, not 'on_step'"),
    ],
)
def test_what_is_no_callback_is_refused(callbacks: Any, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        made(callbacks=callbacks)
