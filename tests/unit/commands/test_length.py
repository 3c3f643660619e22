"""A training without --steps or --epochs is as long as its workload asks for."""

from __future__ import annotations

from typing import Any

import pytest

from shardwise.commands.request import settle_length, settle_options
from shardwise.errors import WorkloadError
from shardwise.workload.load import load_workload
from shardwise.workload.loading import Loading
from shardwise.workload.workload import Workload


def made(**changes: Any) -> Workload:
    fields: dict[str, Any] = {
        "dataset": list(range(10)),
        **dict.fromkeys(("model", "inputs", "loss", "optimizer"), len),
    }
    return Workload(name="w", batch_size=4, **{**fields, **changes})


@pytest.mark.parametrize(
    ("asked", "field", "steps", "epochs"),
    [
        ({}, {}, None, 1),
        ({}, {"epochs": 5}, None, 5),
        ({}, {"epochs": 2.0}, None, 2),
        ({}, {"epochs": 2.5}, 8, None),  # an epoch has 3 steps
        ({}, {"epochs": 0.01}, 1, None),
        ({}, {"epochs": 2.5, "loading": Loading(drop_last=True)}, 5, None),  # an epoch has 2 steps
        ({}, {"epochs": 1.5, "loading": Loading(sampler=range(8))}, 3, None),
        ({"steps": 7}, {"epochs": 5}, 7, None),
        ({"epochs": 3}, {"epochs": 0.5}, None, 3),
    ],
)
def test_the_workload_says_how_long_unless_the_command_does(
    asked: dict[str, int], field: dict[str, float], steps: int | None, epochs: int | None
) -> None:
    options = settle_length(settle_options(**asked), made(**field))
    assert (options.steps, options.epochs) == (steps, epochs)


@pytest.mark.parametrize(
    "fields", [{"dataset": iter([1])}, {"loading": Loading(sampler=lambda epoch: range(epoch + 1))}]
)
def test_a_fraction_of_an_unknown_length_is_refused(fields: dict[str, Any]) -> None:
    with pytest.raises(WorkloadError, match=r"epochs=0\.5 of workload 'w': its epochs have no known length"):
        settle_length(settle_options(), made(**fields, epochs=0.5))


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf"), "3", True])
def test_epochs_that_cannot_be_are_refused(value: Any) -> None:
    with pytest.raises(WorkloadError, match=f"epochs={value}: must be a number above 0"):
        made(epochs=value)


@pytest.mark.parametrize(("recipe", "steps"), [("image", 230), ("language", 500), ("medical", 100)])
def test_a_recipe_trains_as_long_as_its_learning_rate_falls(recipe: str, steps: int) -> None:
    workload = load_workload(recipe)
    options = settle_length(settle_options(), workload)
    assert options.total(-(-len(workload.dataset) // workload.batch_size)) == steps
