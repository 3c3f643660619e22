"""Optimizer states in 8 bits: the optimizer's own update, with the states of one parameter in float32 at a time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any
from unittest import mock

import optimizers
import pytest
import torch
from torch import Tensor, nn

from shardwise.errors import StrategyError
from shardwise.parallel.optim.block_codes import BlockCodec, BlockCodes
from shardwise.parallel.optim.check import check_optimizer
from shardwise.parallel.optim.eight_bit import EightBitStates
from shardwise.parallel.optim.making import Several
from shardwise.parallel.optim.nature import BY_ELEMENT
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

SHAPES = (80, 90), (30,), (64, 64), (40, 10, 12)
STEPS = 6
BOUND = 0.02
"""Largest relative difference of what parameters change by in STEPS steps on random gradients."""

KINDS = sorted(BY_ELEMENT, key=lambda kind: kind.__name__)


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=draw)) for shape in SHAPES]


def made(kind: type, given: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return an optimizer with two groups."""
    options: dict[str, Any] = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer: torch.optim.Optimizer = kind(
        [{"params": given[:2]}, {"params": given[2:], "lr": 0.02}], lr=0.01, **options
    )
    return optimizer


def gradients() -> Iterator[list[Tensor]]:
    draw = torch.Generator().manual_seed(2)
    for _ in range(STEPS):
        yield [torch.randn(shape, generator=draw) for shape in SHAPES]


def stepped(update: Any, given: list[nn.Parameter]) -> list[Tensor]:
    """Return what each parameter changes by."""
    before = [parameter.detach().clone() for parameter in given]
    for each in gradients():
        for parameter, gradient in zip(given, each, strict=True):
            parameter.grad = gradient
        update.step()
    return [parameter.detach() - old for parameter, old in zip(given, before, strict=True)]


@pytest.mark.parametrize("kind", KINDS)
def test_updates_are_those_of_float32_states(kind: type) -> None:
    given, again = parameters(), parameters()
    expected = stepped(made(kind, given), given)
    optimizer = made(kind, again)
    members = [group["params"] for group in optimizer.param_groups]
    found = stepped(EightBitStates(optimizer), again)
    assert [group["params"] for group in optimizer.param_groups] == members
    for shape, one, other in zip(SHAPES, expected, found, strict=True):
        assert (one - other).norm() <= (BOUND if len(shape) > 1 else 0) * one.norm()
    kept = [isinstance(value, BlockCodes) for value in optimizer.state[again[0]].values()]
    assert any(kept)
    assert not any(isinstance(value, BlockCodes) for value in optimizer.state[again[1]].values())  # it is small


def test_one_parameter_at_a_time_has_float32_states() -> None:
    given = parameters()
    optimizer = made(torch.optim.AdamW, given)
    seen: list[int] = []
    narrow = BlockCodec.narrow

    def looked(codec: BlockCodec, tensor: Tensor) -> BlockCodes:
        states = [optimizer.state[parameter] for parameter in given if parameter.dim() > 1]
        seen.append(sum(any(isinstance(v, Tensor) and v.dim() for v in state.values()) for state in states))
        return narrow(codec, tensor)

    with mock.patch.object(BlockCodec, "narrow", looked):
        stepped(EightBitStates(optimizer), given)
    assert set(seen) == {1}
    assert len(seen) == 3 * 2 * STEPS


def test_only_the_optimizers_of_a_turn_are_stepped() -> None:
    given = parameters()
    parts = [torch.optim.AdamW(given[:2], lr=0.01), torch.optim.SGD(given[2:], lr=0.01, momentum=0.9)]
    optimizer = Several(parts)
    update = EightBitStates(optimizer)
    stepped(update, given)
    before = [parameter.detach().clone() for parameter in given]
    codes = optimizer.state[given[2]]["momentum_buffer"]
    optimizer.stepped = (parts[0],)
    update.step()
    assert [torch.equal(p, old) for p, old in zip(given, before, strict=True)] == [False, False, True, True]
    assert optimizer.state[given[2]]["momentum_buffer"] is codes


MODEL = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 6))


def refusal(optimizer: Any) -> str:
    workload = Workload(
        name="tried",
        model=lambda: MODEL,
        dataset=[torch.zeros(64)],
        inputs=lambda batch: batch,
        loss=lambda output, batch: output.mean(),
        optimizer=optimizer,
        batch_size=2,
    )
    with pytest.raises(StrategyError) as caught:
        check_optimizer(workload, Strategy(states=8), MODEL)
    return str(caught.value)


def test_refusals() -> None:
    assert "SGD, the optimizer of workload 'tried', keeps no states without momentum: leave states out" in refusal(
        lambda parameters: torch.optim.SGD(parameters, lr=0.1)
    )
    found = refusal(lambda parameters: optimizers.Lamb(list(parameters)))
    assert "Lamb, the optimizer of workload 'tried', may update parameters together; use one of torch's ASGD," in found
