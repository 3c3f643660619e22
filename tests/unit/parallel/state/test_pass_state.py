"""State that passes change besides gradients is put back: buffers, plain attributes of modules, random state."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from shardwise.parallel.state.pass_state import passes_undone
from shardwise.workload.workload import Workload


class Changing(nn.Module):
    """A module whose pass changes every kind of state."""

    assigned: Tensor
    written: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("assigned", torch.zeros(3))
        self.register_buffer("written", torch.zeros(3), persistent=False)
        self.count, self.rate = 0, 0.5
        self.seen: list[int] = []
        self.table: dict[str, list[float]] = {"a": [1.0]}
        self.kinds = {1}
        self.hidden = torch.zeros(3)
        self.function = len

    def forward(self, x: Tensor) -> Tensor:
        self.count += 1
        self.rate *= 0.9
        self.seen.append(len(x))
        self.table["a"].append(2.0)
        self.table["b"] = []
        self.kinds.add(2)
        self.new = "made in the pass"
        self.hidden += 1
        self.written += 1
        self.assigned = self.assigned + 1
        output: Tensor = self.norm(x + torch.rand(3) + float(np.random.rand()) + random.random())
        return output


def state(module: Changing) -> list[str]:
    plain = [module.count, module.rate, module.seen, module.table, module.kinds, sorted(vars(module))]
    tensors = [module.hidden, *module.buffers()]
    return [repr(value) for value in (*plain, *tensors)]


def workload(loss: Any = lambda output, batch: output.mean()) -> Workload:
    return Workload(
        name="changing",
        model=Changing,
        dataset=[torch.zeros(3)],
        inputs=lambda batch: batch,
        loss=loss,
        optimizer=torch.optim.SGD,
        batch_size=1,
    )


def test_everything_is_put_back() -> None:
    module = Changing()
    before, seen = state(module), module.seen
    with passes_undone(workload(), module):
        module(torch.randn(4, 3))
        assert state(module) != before
    assert state(module) == before
    assert module.seen is seen  # what others refer to is the same list


def test_it_is_put_back_after_an_error() -> None:
    module = Changing()
    before = state(module)
    with pytest.raises(ValueError, match="more than 1 value"), passes_undone(workload(), module):
        module(torch.randn(1, 3))
    assert state(module) == before


def test_what_a_function_of_the_workload_keeps_is_put_back() -> None:
    calls: list[int] = []

    def loss(output: Tensor, batch: Tensor) -> Tensor:
        calls.append(len(batch))
        return output.mean()

    with passes_undone(made := workload(loss), Changing()):
        made.loss(torch.zeros(1), torch.zeros(1))
        assert calls == [1]
    assert calls == []


def test_further_buffers_are_put_back() -> None:
    buffer = torch.zeros(2)
    with passes_undone(workload(), Changing(), [buffer]):
        buffer += 1
    assert buffer.tolist() == [0, 0]


def test_random_generators_draw_again() -> None:
    def draws() -> list[float]:
        return [float(torch.rand(())), float(np.random.rand()), random.random()]

    with passes_undone(workload(), Changing()):
        first = draws()
    assert draws() == first
