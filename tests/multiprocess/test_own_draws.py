"""Random numbers that a model draws itself are those of one process, whoever computes the sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from breaking import assert_noticed
from equality import check, train
from models import ODDITIES, Feedforward, spelled
from pool import Pools
from torch import Tensor, nn

from shardwise.parallel.operators import random_numbers
from shardwise.workload.workload import Workload


class Noisy(Feedforward):
    """Perceptron on tokens that skips samples, and adds noise to each token."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        skipped = torch.rand((len(x), 1, 1), dtype=x.dtype, device=x.device) < 0.3
        return super().forward(x + 0.1 * torch.randn_like(x)) * ~skipped


noisy = spelled(nn.Identity, feedforward=Noisy)


@pytest.mark.parametrize(
    "strategy",
    ["dp=2", "fsdp=2", "pp=2,microbatches=4", "dp=2,tp=2", "dp=2,microbatches=2,recompute=full",
     "tp=2,pp=2,microbatches=2,recompute=full", "pp=2,microbatches=4,schedule=zero-bubble"],
)  # fmt: skip
def test_every_kind_of_draw(workers: Pools, strategy: str) -> None:
    check(workers, ODDITIES["drawn"], strategy)


def drawn_in_loss() -> Workload:
    """A loss that smooths labels by noise, and takes a part of the samples; inputs with noise, as a diffusion has."""

    def loss(output: Tensor, batch: Any) -> Tensor:
        noisy = output + 0.1 * torch.randn_like(output)
        taken = torch.rand((len(output),), dtype=output.dtype, device=output.device) < 0.7
        return (F.cross_entropy(noisy, batch[1], reduction="none") * taken).mean()

    def inputs(batch: Any) -> Tensor:
        noised: Tensor = batch[0] + 0.1 * torch.randn_like(batch[0])
        return noised

    return replace(ODDITIES["low-rank"](), inputs=inputs, loss=loss, evaluation=None)


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2,microbatches=4", "dp=2,tp=2,recompute=full"])
def test_draws_of_inputs_and_loss(workers: Pools, strategy: str) -> None:
    check(workers, drawn_in_loss, strategy)


def test_nothing_is_said_about_them(workers: Pools) -> None:
    for strategy in ("dp=2", "tp=2"):
        notes = train(workers, ODDITIES["drawn"], strategy).notes
        assert not any("random numbers" in note for note in notes)


@pytest.mark.parametrize("strategy", ["tp=2", "tp=2,sp=1", "tp=2,recompute=selective", "dp=2,recompute=full"])
def test_noise_on_tokens(workers: Pools, strategy: str) -> None:
    check(workers, noisy, strategy)


def numbered_by_worker() -> Any:
    def draw(position: Any, *args: Any) -> Tensor:
        return original(replace(position, first=0), *args)

    original = random_numbers.draw
    return mock.patch.object(random_numbers, "draw", draw)


def test_numbers_that_each_replica_draws_for_itself_are_noticed(workers: Pools) -> None:
    assert_noticed(workers, ODDITIES["drawn"], "dp=2", numbered_by_worker)
