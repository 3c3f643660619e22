"""Modules that cannot be traced: one call in the graph, whole on every worker, and still the same training."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from equality import assert_equal, reference, train
from pool import Pools
from torch import Tensor, nn

from shardwise import Evaluation, Workload
from shardwise.errors import WorkloadError
from shardwise.parallel.graph.trace import traced
from shardwise.workload.trace.graph import Untraceable, example
from shardwise.workload.trace.opaque import OPAQUE, CallRecorder


class Gate(nn.Module):
    """Goes one of two ways, by what the numbers are; with dropout, and a batch norm on one of the ways."""

    seen: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.one, self.other = nn.Linear(16, 16), nn.Linear(16, 16)
        self.norm, self.drop = nn.BatchNorm1d(16), nn.Dropout(0.2)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x: Tensor) -> Tensor:
        self.seen = self.seen + 1  # assigned, not changed in place
        y = self.norm(x)
        if y.abs().max().item() > 0.1:  # always, but no trace can know
            y = self.one(y)
        output: Tensor = self.drop(F.gelu(self.other(y)))
        return output


class Gated(nn.Module):
    """A module that cannot be traced between two that can, with dropout before and behind it."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 64), nn.Linear(64, 16)
        self.before, self.behind = nn.Dropout(0.1), nn.Dropout(0.1)
        self.gates = nn.ModuleList([Gate(), Gate()])
        self.third, self.head = nn.Linear(16, 64), nn.Linear(64, 6)

    def forward(self, x: Tensor) -> Tensor:
        x = self.second(self.before(F.gelu(self.first(x))))
        for gate in self.gates:
            x = x + gate(x)
        logits: Tensor = self.head(self.behind(F.gelu(self.third(x))))
        return logits


class Outermost(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.inner(x)
        return y * 2 if y.sum().item() > 0 else y


def classified(model: Callable[[], nn.Module] = Gated) -> Workload:
    generator = torch.Generator().manual_seed(2)
    held_out = [(torch.randn(8, generator=generator, dtype=torch.float64), n % 6) for n in range(10)]
    return Workload(
        name="gated",
        model=lambda: model().double(),
        dataset=[(torch.randn(8, generator=generator, dtype=torch.float64), n % 6) for n in range(24)],
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        batch_size=8,
        clip_norm=0.5,
        evaluation=Evaluation(
            dataset=held_out,
            metric="accuracy",
            measure=lambda output, batch: (output.argmax(1) == batch[1]).double().mean(),
        ),
    )


def test_only_what_fails_is_one_call() -> None:
    work = classified()
    step = traced(work, work.model(), example(work, 4))
    calls = [node for node in step.graph.nodes if node.target is OPAQUE]
    others = [str(node.target) for node in step.graph.nodes if node.op == "call_function"]
    assert len(calls) == 2
    assert sum("linear" in name for name in others) == 4


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2", "fsdp=2", "dp=2,tp=2", "tp=2,pp=2", "fsdp=2,tp=2,recompute=full"])
def test_it_still_trains_alike(strategy: str, workers: Pools) -> None:
    result = train(workers, classified, strategy, evaluate=True)
    assert_equal(result, reference(workers, classified, strategy, evaluate=True), 1e-10)
    if "tp" in strategy:
        assert any("module 'gates.0' cannot be traced" in note for note in result.notes), result.notes


def test_the_outermost_module_is_refused_in_one_line() -> None:
    work = classified(Outermost)
    with pytest.raises(Untraceable, match="use dp or fsdp") as raised:
        traced(work, work.model(), example(work, 4))
    assert "\n" not in str(raised.value)
    assert isinstance(raised.value, WorkloadError)


class Chosen(nn.Module):
    """The mean of the rows that the data chooses: how many follows the data, what comes out has one shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        rows: Tensor = self.inner(x[x[:, 0] > -1])
        return x + rows.mean(0)


class Ragged(nn.Module):
    """Select rows by the data, so that their number follows it."""

    def forward(self, x: Tensor) -> Tensor:
        return x[x[:, 0] > 0]


def chosen() -> Workload:
    return classified(lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), Chosen(), nn.Linear(8, 6)))


def test_shapes_that_follow_the_data_stay_inside(workers: Pools) -> None:
    result = train(workers, chosen, "tp=2,pp=2,microbatches=1")
    assert_equal(result, reference(workers, chosen, "tp=2,pp=2,microbatches=1"), 1e-10)
    assert any("module '3' cannot be traced" in note for note in result.notes), result.notes


def test_shapes_that_follow_the_data_to_the_loss_are_refused() -> None:
    work = classified(lambda: nn.Sequential(nn.Linear(8, 6), Ragged()))
    with pytest.raises(Untraceable, match="follows the data; use dp or fsdp"):
        traced(work, work.model(), example(work, 8))


def test_a_call_that_changes_its_shapes_is_noticed() -> None:
    recorder = CallRecorder(Ragged(), "ragged", "shapes follow the data", lambda: 0)
    with recorder.open():
        recorder.module(torch.ones(4, 2))
    (call,) = recorder.calls
    assert call.run([torch.ones(4, 2)])[0].shape == (4, 2)
    with pytest.raises(RuntimeError, match=r"ragged gave \[\(3, 2\)\], at first \[\(4, 2\)\]"):
        call.run([torch.tensor([[1.0, 1.0]] * 3 + [[-1.0, 1.0]])])


@dataclass
class Holder:
    inner: Tensor


class Held(nn.Module):
    def forward(self, held: Holder) -> Tensor:
        return held.inner * 2 if held.inner.sum().item() > 0 else held.inner


class Holding(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.held = nn.Linear(8, 6), Held()

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.held(Holder(self.first(x)))
        return y


def test_tensors_must_not_hide_in_what_goes_in() -> None:
    work = classified(Holding)
    with pytest.raises(Untraceable, match="value of type Holder"):
        traced(work, work.model(), example(work, 4))


class Noisy(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x + torch.randperm(8) / 80 if x.abs().sum().item() > 0 else x


def noisy() -> Workload:
    return classified(lambda: nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 8), Noisy(), nn.Linear(8, 6)))


def test_random_numbers_that_are_not_keyed_are_said(workers: Pools) -> None:
    notes = train(workers, noisy, "tp=2").notes
    assert any("random numbers of a kind that workers do not share" in note for note in notes), notes
