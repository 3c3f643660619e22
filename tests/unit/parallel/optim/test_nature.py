"""An optimizer is tried to find out what it looks at, whatever its name."""

from __future__ import annotations

from typing import Any

import optimizers
import pytest
import torch
from torch import nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.optim.check import check_optimizer
from shardwise.parallel.optim.nature import Nature, nature_of
from shardwise.parallel.state.build_model import trained_of
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

MODEL = nn.Sequential(nn.Linear(6, 16), nn.Linear(16, 200), nn.Conv1d(3, 4, 2))
MATRICES = {"0.weight", "1.weight", "2.weight"}
ALL = {name for name, _ in MODEL.named_parameters()}


def workload(optimizer: Any, **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "tried",
        "model": lambda: MODEL,
        "dataset": [torch.zeros(6)],
        "inputs": lambda batch: batch,
        "loss": lambda output, batch: output.mean(),
        "optimizer": optimizer,
        "batch_size": 2,
    }
    return Workload(**{**options, **changes})


def nature(optimizer: Any) -> Nature:
    return nature_of(workload(optimizer), trained_of(MODEL), torch.device("cpu"))


class SubclassOfAdam(torch.optim.Adam):
    """Not among the known ones."""


def late(parameters: Any) -> torch.optim.Optimizer:
    """Sides below 128 are treated by element, as Adafactor in JAX does."""

    class Late(optimizers.Factored):
        def change(self, parameter: Any, gradient: Any, state: Any, group: Any) -> Any:
            wide = gradient.dim() > 1 and min(gradient.shape) >= 128
            return super().change(parameter, gradient, state, group) if wide else gradient.tanh()

    return Late(parameters)


class Prepared(optimizers.Kind):
    """Uses its factors only after many steps, which no trial takes."""

    def change(self, parameter: Any, gradient: Any, state: Any, group: Any) -> Any:
        state["factor"] = gradient.flatten(1).sum(1) if gradient.dim() > 1 else gradient.sum()
        return gradient


def centred(parameters: Any) -> torch.optim.Optimizer:
    """SGD with a hook that takes each gradient's mean off it."""
    made = torch.optim.SGD(parameters, lr=0.1)

    def centre(optimizer: Any, *_: Any) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.grad -= parameter.grad.mean()

    made.register_step_pre_hook(centre)
    return made


@pytest.mark.parametrize(
    ("optimizer", "whole"),
    [
        (torch.optim.AdamW, set()),
        (SubclassOfAdam, set()),
        (optimizers.Lion, set()),
        (optimizers.Lamb, ALL),
        (optimizers.Lars, ALL),
        (optimizers.Factored, MATRICES),
        (optimizers.Shampoo, ALL),
        (optimizers.Soap, {"0.weight", "1.weight"}),
        (optimizers.muon, {"0.weight", "1.weight"}),
        (optimizers.adafactor, ALL),
        (Prepared, MATRICES),
        (centred, ALL),
    ],
)
def test_what_is_needed_whole(optimizer: Any, whole: set[str]) -> None:
    found = nature(optimizer)
    assert found.whole == whole
    assert (found.together, found.random, found.unsaved) == (False, False, "")
    assert found.plain == (optimizer in (optimizers.Shampoo, optimizers.Soap))


def test_wide_matrices_are_tried_wide() -> None:
    wide = nn.Linear(200, 150)
    found = nature_of(workload(late), trained_of(wide), torch.device("cpu"))
    assert found.whole == {"weight"}


def test_what_looks_beyond_a_parameter() -> None:
    assert nature(optimizers.Prodigy).together
    assert nature(optimizers.Noisy).random
    assert nature(optimizers.Kept).unsaved == "helper of type Generator"
    assert "neither in its state nor in its groups" in nature(optimizers.Counter).unsaved


def test_trials_leave_the_random_state_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    nature(optimizers.Noisy)
    assert torch.equal(torch.rand(1), expected)


class Twice(optimizers.Kind):
    """Sharpness-aware: wants the loss a second time, and says so only when it steps."""

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is not None, "give a closure"


def test_sparse_gradients_are_tried_too() -> None:
    assert nature(torch.optim.SparseAdam) == Nature("SparseAdam", plain=True)


def built_over_others(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([nn.Parameter(torch.ones(2, 3))], lr=0.1)


def without_biases(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD([p for p in parameters if p.dim() > 1], lr=0.1)


def twice(parameters: Any) -> list[torch.optim.Optimizer]:
    given = list(parameters)
    return [torch.optim.SGD(given, lr=0.1), torch.optim.SGD(given[:1], lr=0.1)]


def failing(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=-1)


def plateau(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)


def steps(optimizer: Any) -> Any:
    return torch.optim.lr_scheduler.StepLR(optimizer, 1)


@pytest.mark.parametrize(
    ("optimizer", "changes", "message"),
    [
        (torch.optim.LBFGS, {}, "LBFGS, the optimizer of workload 'tried', needs a closure"),
        (lambda parameters: 3, {}, "must make a torch optimizer or a list of them, not 3"),
        (failing, {}, "ValueError: Invalid learning rate: -1"),
        (built_over_others, {}, r"not the model's, one of shape \(2, 3\): build it over the parameters"),
        (without_biases, {}, "leaves out 0.bias, 1.bias, 2.bias, which would never be trained"),
        (twice, {}, "SGD with SGD, the optimizer of workload 'tried', would update 0.weight twice in a step"),
        (Twice, {}, "Twice, the optimizer of workload 'tried', cannot take a step: AssertionError: give a closure"),
        (optimizers.Prodigy, {}, "looks at all parameters to update each, and fsdp=2 puts them on several workers"),
        (optimizers.Noisy, {}, "draws random numbers, which differ from worker to worker"),
        (optimizers.Kept, {}, "keeps what a checkpoint cannot hold: its state helper of type Generator"),
        (torch.optim.SGD, {"schedule": plateau}, "needs 'metrics' at each step, and schedule_every='step' gives it"),
        (torch.optim.SGD, {"schedule": plateau, "schedule_every": "metric"}, "follows the evaluation, and it has none"),
        (torch.optim.SGD, {"schedule": steps, "schedule_every": "metric"}, "StepLR takes no metric, use"),
        (torch.optim.SGD, {"groups": lambda name, _: {"weight_deacy": 0}}, "not of SGD; did you mean 'weight_decay'?"),
        (torch.optim.SGD, {"groups": lambda name, _: 0.1}, "gives 0.1 for 0.weight: must be a dict of options"),
        (torch.optim.SGD, {"groups": {"*.wieght": {}}}, r"'\*.wieght' matches no trained parameter; did you mean"),
        (torch.optim.SGD, {"groups": {"0.*": {}, "*.bias": {"lr": 1}}}, r"0.bias matches both '0.\*' and '\*.bias'"),
    ],
)
def test_refused_before_a_worker_starts(optimizer: Any, changes: dict[str, Any], message: str) -> None:
    with pytest.raises((WorkloadError, StrategyError), match=message) as info:
        check_optimizer(workload(optimizer, **changes), Strategy.parse("fsdp=2"), MODEL)
    assert "\n" not in str(info.value)


def test_where_parameters_are_whole_their_values_may_be_looked_at() -> None:
    def by_norm(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.SGD([{"params": [p], "lr": 0.1 / float(p.detach().norm())} for p in parameters])

    check_optimizer(workload(by_norm), Strategy.parse("dp=2"), MODEL)
    with pytest.raises(WorkloadError, match=r"optimizer of workload 'tried': RuntimeError: .* meta tensors"):
        check_optimizer(workload(by_norm), Strategy.parse("fsdp=2"), MODEL)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"schedule_every": "week"}, "schedule_every=week: known are step, epoch, metric"),
        ({"schedule_every": "epoch"}, "schedule_every=epoch needs a schedule"),
        ({"groups": 3}, "groups of workload 'tried' must be a function"),
    ],
)
def test_fields_are_checked_at_birth(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(WorkloadError, match=message):
        workload(torch.optim.SGD, **changes)
