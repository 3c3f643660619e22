"""Optimizers that look at whole matrices, and groups by name: equal to one process however parameters are cut."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from equality import assert_equal, reference, train
from models import make, points
from optimizers import Factored, Kept, Lamb, Lars, Lion, Noisy, Prodigy, Shampoo, Soap
from pool import Pools
from torch import Tensor, nn

from shardwise.errors import StrategyError, WorkloadError
from shardwise.parallel.program import Program
from shardwise.run.checkpoint.checkpoints import Checkpoints
from shardwise.strategy import Strategy
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.workload import Workload

TOLERANCE = 1e-8
"""Eigenvectors and square roots multiply rounding errors."""

TWO = ("dp=2", "fsdp=2,zero=1", "fsdp=2,zero=2", "fsdp=2", "fsdp=2,offload=1", "tp=2", "pp=2")
FOUR = ("fsdp=4", "dp=2,fsdp=2", "dp=2,tp=2", "fsdp=2,tp=2", "fsdp=2,zero=1,tp=2", "fsdp=2,pp=2", "tp=2,pp=2")

KINDS = (Lamb, Shampoo, Lion, Factored, Lars, Soap)


class Deep(nn.Module):
    """A layer for each kind of optimizer; rows that four workers share unevenly."""

    def __init__(self) -> None:
        super().__init__()
        widths = [6, *[10] * len(KINDS), 4]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in pairwise(widths))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x)) + 0.1 * x.mean(-1, keepdim=True)
        return x


def one_for_each_layer(parameters: Any) -> list[torch.optim.Optimizer]:
    """By the place in the list, which must be the model's on every worker. The last layer is torch's."""
    given = list(parameters)
    found: list[torch.optim.Optimizer] = [kind(given[2 * number : 2 * number + 2]) for number, kind in enumerate(KINDS)]
    return [*found, torch.optim.Muon([given[-2]], lr=0.02), torch.optim.Adafactor([given[-1]], lr=0.02)]


def deep() -> Workload:
    return make(
        Deep,
        points(),
        optimizer=one_for_each_layer,
        schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9),
        clip_norm=1.0,
    )


@pytest.mark.parametrize("strategy", [*TWO, *FOUR])
def test_whole_matrices(workers: Pools, strategy: str) -> None:
    result = train(workers, deep, strategy)
    assert_equal(result, reference(workers, deep, strategy), TOLERANCE)
    cut = "tp" in strategy or ("fsdp" in strategy and "zero=1" not in strategy)
    assert any("looks at whole parameters" in note for note in result.notes) == cut


def no_longer_than_one(name: str, weight: Tensor) -> None:
    """It looks at whole matrices, as some of the optimizers do."""
    if weight.dim() > 1:
        weight.div_(weight.norm().clamp(min=1.0))


def bounded() -> Workload:
    size = Evaluation(dataset=points(10), metric="size", measure=lambda output, batch: output.square().mean())
    return replace(deep(), after_step=no_longer_than_one, average=0.7, evaluation=size)


@pytest.mark.parametrize("strategy", ["fsdp=2,zero=1", "fsdp=2", "tp=2", "pp=2", "fsdp=2,tp=2", "fsdp=2,pp=2"])
def test_updates_are_bounded_and_averaged_after_whole_matrices(workers: Pools, strategy: str) -> None:
    expected = reference(workers, bounded, strategy, evaluate=True)
    assert any(name.startswith("average/") for name in expected.state)
    assert_equal(train(workers, bounded, strategy, evaluate=True), expected, TOLERANCE)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


def go_on(strategy: str, folder: Path, factory: Any, steps: int) -> tuple[list[float], dict[str, Tensor] | None]:
    """Steps after the newest checkpoint, if there is one, and one more checkpoint at the end."""
    program = Program.build(factory(), Strategy.parse(strategy))
    checkpoints = Checkpoints(folder)
    if (path := checkpoints.latest()) is not None:
        checkpoints.load(program, path)
    shares = list(program.loader().shares(0))
    losses = []
    for _ in range(steps):
        losses.append(float(program.step_share(shares[program.steps % len(shares)])))
        if program.steps % len(shares) == 0:
            program.next_epoch()
    checkpoints.save(program, {})
    checkpoints.wait()
    return losses, program.full_state_dict()


def check_resumed(workers: Pools, folder: Path, factory: Any, pairs: list[tuple[str, str]]) -> None:
    """Two steps under the first strategy of a pair and two under the second are four on one worker."""
    expected, weights = workers(1, go_on, "single", folder / "alone", factory, 4)[0]
    for number, (first, second) in enumerate(pairs):
        run = folder / str(number)
        losses = []
        for strategy in (first, second):
            part, found = workers(Strategy.parse(strategy).workers, go_on, strategy, run, factory, 2)[0]
            losses += part
        assert losses == pytest.approx(expected, rel=TOLERANCE), (first, second)
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, weights[name], rtol=1e-7, atol=1e-9, msg=f"{first} {second} {name}")


def test_state_that_is_no_tensor_is_read_under_another_strategy(workers: Pools, tmp_path: Path) -> None:
    pairs = [("fsdp=2", "tp=2"), ("tp=2", "pp=2"), ("pp=2", "fsdp=2,zero=1"), ("fsdp=2,zero=1", "single")]
    check_resumed(workers, tmp_path, deep, pairs)


# ---- groups ---------------------------------------------------------------------------------------------------------


def by_name(name: str, parameter: nn.Parameter) -> dict[str, Any]:
    """Layer-wise rates, and no decay for biases and for wide matrices: shapes are the model's, not of a part."""
    options: dict[str, Any] = {"lr": 0.02 * 0.8 ** int(name.split(".")[1])}
    return options if parameter.dim() > 1 and parameter.shape[0] < 10 else {**options, "weight_decay": 0.0}


def grouped() -> Workload:
    return make(
        Deep,
        points(),
        groups=by_name,
        optimizer=lambda groups: torch.optim.AdamW(groups, weight_decay=0.3, eps=1e-5),
        schedule=lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        schedule_every="epoch",
    )


def own_groups() -> Workload:
    """The optimizer's function makes groups itself, by place and by shape."""

    def build(parameters: Any) -> torch.optim.Optimizer:
        given = list(parameters)
        wide = [p for p in given if p.dim() > 1 and p.shape[0] == 10]
        rest = [p for p in given if not any(p is other for other in wide)]
        groups = [{"params": [p], "lr": 0.02 * 0.8**n} for n, p in enumerate(rest)]
        return torch.optim.AdamW([{"params": wide, "weight_decay": 0.5}, *groups], lr=0.03, eps=1e-5)

    return make(Deep, points(), optimizer=build)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2,zero=1", "fsdp=2", "tp=2", "pp=2"])
@pytest.mark.parametrize("factory", [grouped, own_groups])
def test_groups(workers: Pools, factory: Any, strategy: str) -> None:
    assert_equal(train(workers, factory, strategy), reference(workers, factory, strategy), 1e-10)


@pytest.mark.parametrize("factory", [grouped, own_groups])
def test_groups_and_schedules_are_resumed(workers: Pools, tmp_path: Path, factory: Any) -> None:
    check_resumed(workers, tmp_path, factory, [("fsdp=2,zero=1", "tp=2"), ("pp=2", "fsdp=2")])


# ---- what is refused ------------------------------------------------------------------------------------------------


def refusal(optimizer: Any, strategy: str) -> str:
    try:
        Program.build(make(Deep, points(), optimizer=optimizer), Strategy.parse(strategy))
    except (StrategyError, WorkloadError) as error:
        return str(error)
    return ""


def test_refusals(workers: Pools) -> None:
    cases: list[tuple[Any, str, str]] = [
        (
            Prodigy,
            "fsdp=2",
            "looks at all parameters to update each, and fsdp=2 puts them on several workers: use dp=2",
        ),
        (Prodigy, "pp=2", "use dp=2"),
        (Prodigy, "dp=2", ""),
        (Noisy, "dp=2", "draws random numbers"),
        (Kept, "dp=2", "its state helper of type Generator"),
    ]
    for optimizer, strategy, message in cases:
        for told in workers(2, refusal, optimizer, strategy):
            assert (message in told) if message else not told
