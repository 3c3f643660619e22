"""Random numbers that a model draws itself are those of one process, whoever computes the sample."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from breaking import assert_noticed
from equality import check, train
from models import ODDITIES, Feedforward, spelled
from pool import Pools
from torch import Tensor, nn

from shardwise.parallel.operators import random_numbers


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
