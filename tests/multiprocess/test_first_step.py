"""The proof of the first step: it holds for every right training, changes nothing, and fails where a step is wrong."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from equality import portable
from models import ODDITIES, SPELLINGS, WORKLOADS, points
from pool import Pools
from torch import Tensor, nn
from traces import remembered

from shardwise.errors import NotProved
from shardwise.parallel.data.ddp import ReplicatedModel
from shardwise.parallel.program import Program
from shardwise.run.verification import first_step
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.workload import Evaluation, Workload

ALL = {**SPELLINGS, **WORKLOADS, **ODDITIES}


class Counting(nn.Module):
    """Layers whose passes change numbers, lists and tensors of the module, and draw dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(6, 16), nn.Linear(16, 4)
        self.norm = nn.BatchNorm1d(16)
        self.drop = nn.Dropout(0.3)
        self.calls = 0
        self.seen: list[int] = []
        self.register_buffer("mean", torch.zeros(16))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            self.calls += 1
            self.seen.append(len(x))
        hidden = self.drop(torch.relu(self.norm(self.first(x))))
        self.mean += 0.1 * hidden.detach().mean(0)
        output: Tensor = self.last(hidden) * (1 + 0.1 * self.calls)
        return output


def workload(**changes: Any) -> Workload:
    fields: dict[str, Any] = {
        "name": "counted",
        "model": Counting,
        "dataset": points(),
        "inputs": lambda batch: batch[0].float(),
        "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "batch_size": 8,
    }
    return Workload(**{**fields, **changes})


def steps(made: Workload, strategy: str, proof: bool) -> dict[str, Any]:
    """Two steps, with or without a proof before them, and all that they leave behind."""
    program = Program.build(made, Strategy.parse(strategy))
    found = prove_first_step(program) if proof else None
    losses = [float(program.step_share(share)) for share in program.loader().shares(0)][:2]
    counts = [(module.calls, module.seen) for module in program.engine.module.modules() if isinstance(module, Counting)]
    drawn = (float(torch.rand(())), float(np.random.rand()))
    pieces = [portable(piece)[:2] for piece in program.pieces()]
    return {"found": found, "losses": losses, "counts": counts, "drawn": drawn, "pieces": pieces}


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "dp=2,recompute=full"])
def test_a_training_with_a_proof_is_bit_for_bit_the_one_without(workers: Pools, strategy: str) -> None:
    proved, plain = (workers(2, steps, workload(), strategy, proof) for proof in (True, False))
    for with_proof, without in zip(proved, plain, strict=True):
        assert with_proof["found"].proved
        for key in ("losses", "counts"):
            assert with_proof[key] == without[key]
        for (name, a), (other, b) in zip(with_proof["pieces"], without["pieces"], strict=True):
            assert name == other
            assert torch.equal(a, b), name


def proved(made: list[Workload], strategy: str) -> list[str]:
    """Reasons and refusals of the first steps of workloads; empty texts for those that are proved."""
    found = []
    for each in made:
        try:
            found.append(prove_first_step(Program.build(each, Strategy.parse(strategy))).reason or "")
        except NotProved as error:
            found.append(str(error))
    return found


def all_proved(factories: list[Callable[[], Workload]], strategy: str) -> list[str]:
    """Prove the first steps of the workloads that these functions make, as `proved` does."""
    found = []
    for factory in factories:
        with remembered(factory):
            found += proved([factory()], strategy)
    return found


def one(workers: Pools, made: Workload, strategy: str) -> str:
    """Return the reason or refusal that all workers have."""
    found = workers(Strategy.parse(strategy).workers, proved, [made], strategy)
    assert all(each == found[0] for each in found)
    return str(found[0][0])


class Complex(nn.Module):
    """Filter with complex parameters, of which a perceptron's features are transformed."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(6, 16), nn.Linear(16, 4)
        self.filter = nn.Parameter(torch.randn(16, dtype=torch.complex64))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.down(torch.fft.ifft(torch.fft.fft(self.up(x)) * self.filter).real)
        return output


class Slope(nn.Module):
    """Layer on the derivative of an energy by its input, for which the forward makes a leaf of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.energy, self.out = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)), nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = x.clone().requires_grad_()
        with torch.enable_grad():
            (slope,) = torch.autograd.grad(self.energy(x).sum(), x, create_graph=True)
        output: Tensor = self.out(slope)
        return output


@pytest.mark.parametrize(
    ("model", "strategy"), [(Complex, "dp=2"), (Complex, "tp=2"), (Slope, "dp=2"), (Slope, "fsdp=2,recompute=full")]
)
def test_complex_parameters_and_leaves_of_a_forward_are_proved(
    model: type[nn.Module], strategy: str, workers: Pools
) -> None:
    assert one(workers, workload(model=model), strategy) == ""


@pytest.mark.parametrize("strategy", ["dp=2", "tp=2"])
def test_no_right_training_is_refused(workers: Pools, strategy: str) -> None:
    """Two models use a mean over the batch that they wrote into a buffer: replicas would have other means."""
    coupled = {"assigns-buffer", "updates-buffer"} if strategy == "dp=2" else set()
    found = workers(2, all_proved, list(ALL.values()), strategy)
    assert found[0] == found[1]
    for name, why in zip(ALL, found[0], strict=True):
        assert ("no mean over samples" in why) if name in coupled else (why == ""), (name, why)


@pytest.mark.parametrize("strategy", ["pp=2", "dp=2,tp=2", "fsdp=2,pp=2", "fsdp=4", "dp=4"])
def test_products_and_four_workers_are_proved(workers: Pools, strategy: str) -> None:
    made = [WORKLOADS[name] for name in ("gpt", "resnet") if name in WORKLOADS] or [workload]
    found = workers(Strategy.parse(strategy).workers, all_proved, made, strategy)
    assert all(not why for each in found for why in each), found[0]


def proved_with_few_replicas(made: Workload, strategy: str) -> list[str]:
    with mock.patch.object(first_step, "MOST_REPLICAS", 2):
        return proved([made], strategy)


def test_of_many_replicas_all_are_compared_where_two_differ(workers: Pools) -> None:
    """A batch norm couples all replicas, so the samples of two of them alone give other gradients."""
    found = workers(4, proved_with_few_replicas, workload(), "dp=4")
    assert found == [[""]] * 4


def proved_without_averaging(made: Workload, strategy: str) -> list[str]:
    def alone(self: ReplicatedModel, first: bool, last: bool) -> Any:
        return self.call.no_sync()

    with mock.patch.object(ReplicatedModel, "microbatch", alone):
        return proved([made], strategy)


def test_a_gradient_that_is_not_averaged_is_noticed(workers: Pools) -> None:
    found = workers(2, proved_without_averaging, workload(), "dp=2")
    assert "is not that of one process: the gradient of" in found[0][0]
    assert found[0] == found[1]


class Clip(nn.Module):
    """Scores of each sample against all others: its loss couples the batch."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(6, 8), nn.Linear(6, 8)

    def forward(self, x: Tensor) -> Tensor:
        return F.normalize(self.a(x), dim=-1) @ F.normalize(self.b(x.flip(1)), dim=-1).T * 5


class Plain(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4))


COUPLED: dict[str, dict[str, Any]] = {
    "contrastive": {"model": Clip, "loss": lambda output, _: F.cross_entropy(output, torch.arange(len(output)))},
    "sum": {
        "model": Plain,
        "loss": lambda output, batch: F.cross_entropy(output, batch[1], reduction="sum"),
    },
    "not-padding": {
        "model": Plain,
        "loss": lambda output, batch: F.cross_entropy(output, batch[1].where(batch[1] > 1, -100), ignore_index=-100),
    },
}


@pytest.mark.parametrize("name", COUPLED)
@pytest.mark.parametrize("strategy", ["dp=2", "pp=2,microbatches=4"])
def test_a_loss_that_is_no_mean_over_samples_is_refused(workers: Pools, name: str, strategy: str) -> None:
    said = one(workers, workload(**COUPLED[name]), strategy)
    assert "the loss of workload 'counted' is no mean over samples: it is" in said


def test_a_loss_over_the_whole_batch_is_right_where_nothing_cuts_the_batch(workers: Pools) -> None:
    assert one(workers, workload(**COUPLED["contrastive"]), "tp=2") == ""


def test_a_weight_makes_a_loss_over_some_tokens_a_mean(workers: Pools) -> None:
    made = workload(**COUPLED["not-padding"], weight=lambda batch: (batch[1] > 1).sum())
    assert one(workers, made, "dp=2") == ""


def test_tensors_that_only_the_loss_would_train_are_refused(workers: Pools) -> None:
    bias = torch.zeros(4, requires_grad=True)
    made = workload(loss=lambda output, batch: F.cross_entropy(output + bias, batch[1]))
    for strategy in ("single", "dp=2"):
        assert "a trained tensor of shape (4,) that is no parameter of the model" in one(workers, made, strategy)


def test_an_evaluation_is_tried_before_the_training(workers: Pools) -> None:
    wrong = Evaluation(dataset=points(8), metric="odd", measure=lambda output, batch: batch[7])
    assert one(workers, workload(evaluation=wrong), "dp=2").startswith("evaluation of workload 'counted' fails: ")


class Drawing(Counting):
    """Noise that each worker draws for itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + 0.1 * torch.randperm(x.shape[-1]))


class Narrow(nn.Linear):
    """Layer that works only on as many samples as a replica trains with."""

    def __init__(self) -> None:
        super().__init__(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        if len(x) != 4:
            raise ValueError("four samples are wanted")
        return super().forward(x)


def once() -> Any:
    return iter([points()[index] for index in range(24)])


def proved_without_room(made: Workload, strategy: str) -> list[str]:
    with mock.patch.object(first_step, "free_memory", return_value=1000):
        return proved([made], strategy)


def test_what_cannot_be_proved_says_why(workers: Pools) -> None:
    assert "draws random numbers that no two workers share" in one(workers, workload(model=Drawing), "dp=2")
    assert one(workers, workload(dataset=once()), "dp=2") == "the dataset can be read only once"
    said = one(workers, workload(model=Narrow), "dp=2")
    assert said == "worker 0 cannot compute a step alone: ValueError: four samples are wanted"
    assert "worker 0 would need" in workers(2, proved_without_room, workload(), "dp=2")[0][0]
