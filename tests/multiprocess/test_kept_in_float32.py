"""Modules and parameters stay in float32 under every strategy: bfloat16 would round what these compute to 0."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from breaking import assert_noticed
from equality import assert_equal, reference, train
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.parallel.data import module_engine
from shardwise.parallel.data.fsdp import ShardedModel
from shardwise.workload.precision import NOTHING
from shardwise.workload.trace import graph
from shardwise.workload.workload import Workload

WIDTH = 16
TINY = 2**-12
"""Part of a weight beyond 1 that bfloat16 loses."""


class Exact(nn.Module):
    """A layer whose weights are 1 + TINY times the identity, and what it adds to its input, which is exact in bfloat16.

    With `watched`, it cannot be traced.
    """

    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.linear, self.watched = nn.Linear(WIDTH, WIDTH, bias=False), watched
        with torch.no_grad():
            self.linear.weight.copy_(torch.eye(WIDTH) * (1 + TINY))

    def forward(self, x: Tensor) -> Tensor:
        if self.watched and float(x.detach().sum()) == 0.1234:
            return x
        difference: Tensor = (self.linear(x) - x) / TINY
        return difference


class Layers(nn.Module):
    def __init__(self, watched: bool) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.Tanh(), nn.Linear(4 * WIDTH, WIDTH)) for _ in range(3)
        )
        self.scale = nn.Parameter(torch.full((WIDTH,), 1 + TINY))
        self.exact = Exact(watched)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ones = torch.ones_like(x)
        scaled = (ones * self.scale - 1) / TINY
        exact = self.exact(ones)
        for block in self.blocks:
            x = x + block(x)
        return x, scaled, exact


def loss(output: tuple[Tensor, Tensor, Tensor], batch: tuple[Tensor, Tensor]) -> Tensor:
    """1 of the layer and 1 of the parameter that stay in float32, beside a little of the rest."""
    return F.mse_loss(output[0], batch[1]) / 100 + output[1].mean() + output[2].square().mean()


def work(watched: bool = False, chosen: str = "bf16") -> Workload:
    draw = torch.Generator().manual_seed(0)
    x, y = (torch.randn(16, WIDTH, generator=draw) for _ in range(2))
    return Workload(
        name="exact",
        model=lambda: Layers(watched),
        dataset=TensorDataset(x, y),
        inputs=lambda batch: batch[0],
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-9),
        batch_size=8,
        precision=chosen,
        float32=("exact", "scale"),
    )


@pytest.mark.parametrize("chosen", ["bf16", "autocast"])
def test_one_process_computes_them_in_float32(workers: Pools, chosen: str) -> None:
    found = reference(workers, partial(work, chosen=chosen), "single", 1)
    assert 1.99 < found.losses[0] < 2.1
    with mock.patch.object(module_engine, "kept_of", return_value=NOTHING):
        rounded = train(workers, partial(work, chosen=chosen), "single", 1)
    assert rounded.losses[0] < (0.1 if chosen == "bf16" else 1.1)  # autocast sees the parameter in float32 anyway


@pytest.mark.parametrize("watched", [False, True])
@pytest.mark.parametrize(
    "strategy",
    ["dp=2", "fsdp=2", "fsdp=2,zero=2,microbatches=2", "fsdp=2,zero=1", "tp=2", "pp=2", "pp=2,schedule=zero-bubble"],
)
def test_workers_compute_them_in_float32(workers: Pools, strategy: str, watched: bool) -> None:
    factory: Callable[[], Workload] = partial(work, watched)
    found = train(workers, factory, strategy, 2)
    assert_equal(found, reference(workers, factory, strategy, 2), 1e-2)
    assert 1.99 < found.losses[0] < 2.1


@pytest.mark.parametrize("strategy", ["fsdp=2,tp=2", "fsdp=2,pp=2", "dp=2,fsdp=2"])
def test_sharding_leaves_them_whole_in_products(workers: Pools, strategy: str) -> None:
    found = train(workers, work, strategy, 2)
    assert_equal(found, reference(workers, work, strategy, 2), 1e-2)
    assert 1.99 < found.losses[0] < 2.1


@pytest.mark.parametrize("strategy", ["fsdp=2", "tp=2"])
def test_they_stay_in_float32_in_autocast(workers: Pools, strategy: str) -> None:
    factory = partial(work, chosen="autocast")
    assert_equal(train(workers, factory, strategy, 2), reference(workers, factory, strategy, 2), 1e-2)


def test_gradients_that_are_not_averaged_are_noticed(workers: Pools) -> None:
    assert_noticed(workers, work, "fsdp=2", lambda: mock.patch.object(ShardedModel, "average_whole"))


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2"])
def test_rounding_them_is_noticed(workers: Pools, strategy: str) -> None:
    assert_noticed(workers, work, strategy, lambda: mock.patch.object(graph, "kept_of", return_value=NOTHING))
