"""Turns of a training step: what they say, and what cannot be meant."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardwise.commands.auto import choose
from shardwise.commands.forecast import forecasts
from shardwise.commands.request import check
from shardwise.errors import NotMeasured, RequestError, StrategyError, WorkloadError
from shardwise.parallel.data.turns import check_turns
from shardwise.predict.simulate import profiles_on
from shardwise.strategy import Strategy
from shardwise.workload.turns import NOT_PREDICTED, Turn, losses_of_turns, names_of_turns
from shardwise.workload.workload import Workload


def nothing(*_: Any) -> Any:
    raise AssertionError("this step is for looking at")


FIRST, SECOND = Turn(step=nothing, parameters=("0.*",)), Turn(step=nothing, parameters=("1.*",), every=3)


def build(step: Any = (FIRST, SECOND), **changes: Any) -> Workload:
    return Workload(
        name="turns",
        model=lambda: nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2)),
        dataset=[torch.zeros(2)] * 4,
        step=step,
        batch_size=2,
        **{"optimizer": lambda groups: [torch.optim.SGD([group], lr=0.1) for group in groups], **changes},
    )


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"step": "loss"}, "step of a turn must be a function, not 'loss'"),
        ({"parameters": "critic.*"}, r"parameters of a turn must be a tuple of patterns .* not 'critic.\*'"),
        ({"parameters": ()}, r"parameters of a turn must be a tuple of patterns .* not \(\)"),
        ({"parameters": (1,)}, r"parameters of a turn must be a tuple of patterns .* not \(1,\)"),
        ({"every": 0}, "every=0 of a turn: must be a whole number of training steps, 1 or more"),
        ({"every": 1.5}, "every=1.5 of a turn"),
        ({"every": True}, "every=True of a turn"),
    ],
)
def test_a_turn_that_cannot_be_meant_is_refused(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        Turn(**{"step": nothing, "parameters": ("0.*",), **fields})


@pytest.mark.parametrize(
    ("step", "said"),
    [
        ([], r"step of workload 'turns' is empty: give a function, or one Turn or more"),
        ([FIRST, nothing], "step of workload 'turns' must be a function or a list of turns, and has <function"),
        (FIRST, "step of workload 'turns' must be a function"),
        ([SECOND], "no turn of workload 'turns' is taken in each step"),
        ([Turn(step=nn.Linear(1, 1), parameters=("0.*",))], "step of a turn of workload 'turns' has parameters"),
    ],
)
def test_steps_that_are_no_turns_are_refused(step: Any, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        build(step)


def test_a_turn_is_due_in_the_first_of_so_many_steps() -> None:
    assert [steps for steps in range(7) if SECOND.is_due(steps)] == [0, 3, 6]
    assert all(FIRST.is_due(steps) for steps in range(7))


def test_each_parameter_is_in_one_turn() -> None:
    names = ["1.bias", "0.weight", "0.bias"]
    assert names_of_turns("turns", (FIRST, SECOND), names) == (("0.weight", "0.bias"), ("1.bias",))
    assert names_of_turns("turns", (), names) == (tuple(names),)


def test_a_pattern_that_is_misspelt_is_refused() -> None:
    with pytest.raises(WorkloadError, match=r"turn 2 of workload 'turns': '1.\*' matches no trained parameter"):
        names_of_turns("turns", (FIRST, SECOND), ["0.weight"])


def test_a_single_loss_has_the_name_of_its_turn() -> None:
    assert losses_of_turns("turns", {0: {"loss": 1}, 2: {"a": 2, "b": 3}}) == {"turn 1": 1, "a": 2, "b": 3}


@pytest.mark.parametrize("strategy", ["single", "dp=2", "dp=2,microbatches=2", "dp=2,shares=3:1", "precision=bf16"])
def test_turns_train_with_replicas(strategy: str) -> None:
    check_turns(build(), Strategy.parse(strategy))


@pytest.mark.parametrize(
    ("strategy", "hint"),
    [
        ("tp=2", "dp=2"),
        ("pp=2", "dp=2"),
        ("fsdp=2", "dp=2"),
        ("fsdp=2,zero=1", "dp=2"),
        ("fsdp=2,offload=1", "dp=2"),
        ("dp=2,tp=2", "dp=4"),
        ("dp=2,recompute=full", "dp=2"),
        ("recompute=full", "single"),
    ],
)
def test_other_strategies_are_refused(strategy: str, hint: str) -> None:
    with pytest.raises(StrategyError, match=f"{strategy}.*: turns of a step train .*: use {hint}$"):
        check_turns(build(), Strategy.parse(strategy))


@pytest.mark.parametrize(
    ("workload", "strategy", "said"),
    [
        (build(), "tp=2", "turns of a step train with dp alone"),
        (build([FIRST, Turn(step=nothing, parameters=("2.*",))]), "dp=2", r"'2.\*' matches no trained parameter"),
        (build(optimizer=lambda groups: torch.optim.SGD(groups)), "dp=2", "SGD, an optimizer of workload 'turns'"),
    ],
)
def test_a_request_is_refused_before_a_worker_starts(workload: Workload, strategy: str, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        check(workload, Strategy.parse(strategy))


def test_nothing_is_predicted() -> None:
    (forecast,) = forecasts(build(), [Strategy()])
    assert (forecast.seconds, forecast.reason) == (None, NOT_PREDICTED)
    with pytest.raises(NotMeasured, match=NOT_PREDICTED):
        choose(build())
    with pytest.raises(WorkloadError, match=f"workload 'turns': {NOT_PREDICTED}"):
        profiles_on(build(), None)  # type: ignore[arg-type]
