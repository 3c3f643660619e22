"""Modules that merge weights in train() and eval(): right where each worker runs the model, else refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise import Evaluation, Strategy, Workload
from shardwise.errors import WorkloadError
from shardwise.parallel.check import check_strategy
from shardwise.parallel.program import Program
from shardwise.parallel.state.build_model import evaluating
from shardwise.parallel.state.mode_changes import _changing
from shardwise.run.verification.first_step import prove_first_step


class Merging(nn.Linear):
    """Linear layer with an adapter that is merged into the weight in evaluation; at first it changes no value."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__(inputs, outputs)
        self.down, self.up = nn.Parameter(torch.randn(2, inputs)), nn.Parameter(torch.zeros(outputs, 2))
        self.weight.requires_grad_(False)
        self.merged = False

    def train(self, mode: bool = True) -> Merging:
        super().train(mode)
        if mode == self.merged:
            change = self.up.data @ self.down.data
            self.weight.data += -change if mode else change
            self.merged = not mode
        return self

    def forward(self, x: Tensor) -> Tensor:
        y = F.linear(x, self.weight, self.bias)
        return y if self.merged else y + x @ self.down.T @ self.up.T


class Replacing(nn.Linear):
    def eval(self) -> Replacing:
        self.weight.data = self.weight.data.clone()
        return super().eval()


class Frozen(nn.Sequential):
    """A module whose part never trains: no weight changes."""

    def train(self, mode: bool = True) -> Frozen:
        super().train(mode)
        self[0].eval()
        return self


def points() -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(16, 6, generator=generator), torch.randint(0, 4, (16,), generator=generator))


def workload() -> Workload:
    return Workload(
        name="adapters",
        model=lambda: nn.Sequential(Merging(6, 16), nn.ReLU(), Merging(16, 4)),
        dataset=points(),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.5),
        batch_size=8,
        evaluation=Evaluation(
            dataset=points(),
            metric="accuracy",
            measure=lambda output, batch: (output.argmax(-1) == batch[1]).float().mean(),
        ),
    )


def trained(strategy: str) -> tuple[list[float], list[float], Any]:
    """Losses, held-out losses and weights of two steps, each with an evaluation before it, after a proof."""
    program = Program.build(workload(), Strategy.parse(strategy))
    assert prove_first_step(program).reason is None
    losses, held_out = [], []
    for share in program.loader().shares(0):
        held_out.append(program.evaluate()["loss"])
        losses.append(float(program.step_share(share)))
    return losses, held_out, program.full_state_dict()


def test_adapters_learn_after_an_evaluation(workers: Pools) -> None:
    alone = trained("single")
    assert bool((alone[2]["0.up"] != 0).any())
    parallel = workers(2, trained, "dp=2")[0]
    assert parallel[:2] == (pytest.approx(alone[0], rel=1e-5), pytest.approx(alone[1], rel=1e-5))
    for name, tensor in alone[2].items():
        torch.testing.assert_close(parallel[2][name], tensor)


def test_sharded_weights_cannot_be_merged(workers: Pools) -> None:
    with pytest.raises(WorkloadError, match=r"module '2' \(Merging\) .* changes its weights in train\(\) and eval\(\)"):
        workers(2, trained, "fsdp=2")


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2"])
def test_traced_weights_cannot_be_merged(strategy: str) -> None:
    with pytest.raises(WorkloadError, match=rf"module '2' \(Merging\) .* which {strategy}"):
        check_strategy(workload(), Strategy.parse(strategy))


def test_only_changes_of_weights_are_found() -> None:
    assert _changing(nn.Sequential(nn.Linear(2, 2), Replacing(2, 2))) == "1"
    frozen = Frozen(nn.BatchNorm1d(2), nn.Linear(2, 2))
    frozen.train()
    assert _changing(frozen) is None
    assert (frozen.training, frozen[0].training, frozen[1].training) == (True, False, True)
    with evaluating(frozen):
        assert not frozen[1].training
    assert (frozen.training, frozen[0].training, frozen[1].training) == (True, False, True)
