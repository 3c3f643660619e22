"""A function of each parameter after an update: every strategy gives what it gives on whole parameters."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from breaking import assert_noticed
from equality import check
from models import points
from pool import Pools
from torch import Tensor, nn

from shardwise.errors import NotProved, WorkloadError
from shardwise.parallel.optim import after_step
from shardwise.parallel.optim.after_step import AfterStep
from shardwise.parallel.program import Program
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


class Model(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def clipped(name: str, weight: Tensor) -> Any:
    return weight.clamp_(-0.1, 0.1)


def rows_normed(name: str, weight: Tensor) -> None:
    """At most a norm of 0.4: it does nothing to random numbers that are small."""
    if weight.dim() == 2:
        weight.mul_((0.4 / weight.norm(dim=1, keepdim=True)).clamp(max=1))


def columns_centred(name: str, weight: Tensor) -> None:
    if weight.dim() == 2:
        weight.sub_(weight.mean(0, keepdim=True))


def whole_normed(name: str, weight: Tensor) -> None:
    if name == "2.weight":
        weight.div_(weight.norm())


def masked(name: str, weight: Tensor) -> None:
    shapes = {"0.weight": (16, 6), "2.weight": (16, 16), "4.weight": (4, 16)}
    if name in shapes:
        weight.mul_(torch.arange(shapes[name][0] * shapes[name][1]).view(shapes[name]) % 3 > 0)


def made(function: Callable[[str, Tensor], Any]) -> Workload:
    return Workload(
        name="after",
        model=lambda: Model().double(),
        dataset=points(24),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=0.05),
        batch_size=8,
        after_step=function,
    )


FACTORIES = {f: partial(made, f) for f in (clipped, rows_normed, columns_centred, whole_normed, masked)}
STRATEGIES = ["dp=2", "fsdp=2", "fsdp=2,zero=1", "tp=2", "pp=2", "dp=2,tp=2", "fsdp=2,pp=2"]


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("function", FACTORIES)
def test_every_function_equals_one_process(workers: Pools, function: Any, strategy: str) -> None:
    check(workers, FACTORIES[function], strategy)


def joined(function: Any, strategy: str) -> list[str]:
    program = Program.build(made(function), Strategy.parse(strategy))
    assert isinstance(program._after_step, AfterStep)
    return list(program._after_step._joined)


@pytest.mark.parametrize(
    ("function", "strategy", "expected"),
    [
        (clipped, "fsdp=2", []),
        (clipped, "tp=2", []),
        (rows_normed, "fsdp=2", []),
        (rows_normed, "tp=2", ["2.weight"]),  # the one that is cut by columns
        (columns_centred, "fsdp=2", ["0.weight", "2.weight", "4.weight"]),
        (whole_normed, "fsdp=2", ["2.weight"]),
        (masked, "dp=2", []),
    ],
)
def test_only_what_needs_it_is_joined(workers: Pools, function: Any, strategy: str, expected: list[str]) -> None:
    assert workers(2, joined, function, strategy) == [expected] * 2


def test_a_function_that_is_called_on_parts_is_noticed(workers: Pools) -> None:
    alone = lambda: mock.patch.object(AfterStep, "_tried", return_value=True)  # noqa: E731
    assert_noticed(workers, FACTORIES[whole_normed], "fsdp=2", alone)


def counted(strategy: str) -> int:
    """Return the number of calls in a proof and a step."""
    calls = [0]

    def clip(name: str, weight: Tensor) -> None:
        calls[0] += 1
        weight.clamp_(-0.1, 0.1)

    program = Program.build(made(clip), Strategy.parse(strategy))
    assert prove_first_step(program).proved
    program.step_share(next(program.loader().shares(0)))
    return calls[0]


def test_what_a_function_counts_in_trials_is_undone(workers: Pools) -> None:
    assert counted("single") == 6
    assert workers(2, counted, "dp=2") == [6, 6]


def noisy(name: str, weight: Tensor) -> None:
    weight.add_(torch.randn_like(weight))


def failing(name: str, weight: Tensor) -> None:
    raise KeyError(name)


@pytest.mark.parametrize(
    ("function", "said"),
    [
        (noisy, r"after_step of workload 'after' gives something else each time for 0\.weight: every worker would"),
        (failing, r"after_step of workload 'after' fails for 0\.weight: KeyError: '0\.weight'"),
        (lambda name, weight: weight.clamp(-1, 1), r"makes a new tensor for 0\.weight, which nothing would use"),
    ],
)
def test_what_cannot_be_kept_is_refused_before_the_first_step(workers: Pools, function: Any, said: str) -> None:
    with pytest.raises(WorkloadError, match=said):
        workers(2, joined, function, "dp=2")


@pytest.mark.parametrize("function", [failing, lambda name, weight: weight.clamp(-1, 1)])
def test_one_process_refuses_it_too(function: Any) -> None:
    with pytest.raises(NotProved, match="after_step of workload 'after'"):
        prove_first_step(Program.build(made(function), Strategy()))


def test_what_is_no_function_is_refused() -> None:
    with pytest.raises(WorkloadError, match="after_step of workload 'after' must be a function, not 3"):
        made(3)  # type: ignore[arg-type]


def test_a_tensor_whose_memory_was_replaced_is_refused() -> None:
    def replaced(name: str, weight: Tensor) -> None:
        weight.data = weight.clamp(-1, 1)

    with pytest.raises(WorkloadError, match="makes a new tensor"):
        after_step.changed(made(replaced), "weight", torch.ones(3))
