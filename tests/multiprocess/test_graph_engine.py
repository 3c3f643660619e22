"""Tensor parallelism, pipelines and their products train what one process trains, on 2 and 4 workers, in float64."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from equality import assert_equal, reference, train
from models import SPELLINGS, WORKLOADS, make, points
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import Subset

from shardwise import Workload

TOLERANCE = 1e-10


def check(workers: Pools, name: str, strategy: str, *, evaluate: bool = False) -> None:
    factory = {**SPELLINGS, **WORKLOADS}[name]
    actual = train(workers, factory, strategy, evaluate=evaluate)
    assert_equal(actual, reference(workers, factory, strategy, evaluate=evaluate), TOLERANCE)


@pytest.mark.parametrize("name", sorted(SPELLINGS))
def test_every_spelling_of_attention(name: str, workers: Pools) -> None:
    check(workers, name, "tp=2")


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_model_by_tensors(name: str, workers: Pools) -> None:
    check(workers, name, "tp=2")


@pytest.mark.parametrize("name", sorted(WORKLOADS))
def test_every_model_in_a_pipeline(name: str, workers: Pools) -> None:
    check(workers, name, "pp=2")


@pytest.mark.parametrize("schedule", ["gpipe", "interleaved", "zero-bubble"])
@pytest.mark.parametrize("name", ["separate", "unet"])
def test_every_schedule(name: str, schedule: str, workers: Pools) -> None:
    check(workers, name, f"pp=2,schedule={schedule}", evaluate=True)


PRODUCTS = [
    "tp=2,sp=1",
    "tp=2,microbatches=4",
    "tp=2,recompute=full",
    "pp=2,recompute=full",
    "tp=4",
    "pp=4",
    "dp=2,tp=2",
    "dp=2,pp=2",
    "dp=2,pp=2,schedule=zero-bubble",
    "tp=2,pp=2",
    "tp=2,sp=1,pp=2,schedule=interleaved",
    "fsdp=2,tp=2",
    "fsdp=2,zero=2,tp=2,recompute=full",
    "fsdp=2,zero=1,tp=2",
    "fsdp=2,pp=2",
    "fsdp=2,zero=2,pp=2,schedule=interleaved",
    "fsdp=2,zero=1,pp=2,schedule=gpipe",
    "fsdp=2,pp=2,schedule=zero-bubble",
]


@pytest.mark.parametrize("strategy", PRODUCTS)
@pytest.mark.parametrize("name", ["tied", "resnet"])
def test_every_product(name: str, strategy: str, workers: Pools) -> None:
    check(workers, name, strategy)


@pytest.mark.parametrize("strategy", ["dp=2,tp=2,pp=2", "fsdp=2,tp=2,pp=2"])
def test_three_axes(strategy: str, workers: Pools) -> None:
    check(workers, "separate", strategy)


def uneven() -> Workload:
    whole = WORKLOADS["perceptron"]()
    return replace(whole, dataset=Subset(whole.dataset, range(9)), batch_size=8)


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2", "dp=2,tp=2", "dp=2,pp=2", "fsdp=2,pp=2"])
def test_last_batches_that_do_not_divide(strategy: str, workers: Pools) -> None:
    actual = train(workers, uneven, strategy, steps=4)  # batches of 8, 1, 8, 1
    assert_equal(actual, reference(workers, uneven, strategy, steps=4), TOLERANCE)


class Chain(nn.Module):
    """A random chain of layers; what each does depends on the seed."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(seed)
        self.kinds = [int(kind) for kind in torch.randint(0, 7, (6,), generator=draw)]
        self.first = nn.Linear(6, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8, bias=bool(kind % 2)) for kind in self.kinds)
        self.norm = nn.LayerNorm(8)
        self.gate = nn.Linear(8, 16)
        self.last = nn.Linear(8, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for kind, layer in zip(self.kinds, self.layers, strict=True):
            x = self.apply_layer(kind, layer, x)
        return self.last(x)

    def apply_layer(self, kind: int, layer: nn.Module, x: Tensor) -> Tensor:
        if kind == 0:
            return F.gelu(layer(x))
        if kind == 1:
            return x + layer(self.norm(x))
        if kind == 2:
            a, b = self.gate(x).chunk(2, -1)
            return layer(a * b.sigmoid())
        if kind == 3:
            return torch.cat([x[:, 4:], layer(x)[:, :4]], 1)
        if kind == 4:
            return layer(x).view(-1, 2, 4).transpose(1, 2).reshape(-1, 8)
        if kind == 5:
            return layer(x).softmax(-1) * x.mean(-1, keepdim=True)
        heads = layer(x).view(-1, 4, 2)
        return (heads @ heads.transpose(1, 2) @ heads).flatten(1).tanh()


def chain(seed: int) -> Workload:
    return make(lambda: Chain(seed), points())


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2,schedule=zero-bubble"])
@pytest.mark.parametrize("seed", range(8))
def test_random_chains(seed: int, strategy: str, workers: Pools) -> None:
    factory = partial(chain, seed)
    assert_equal(train(workers, factory, strategy), reference(workers, factory, strategy), TOLERANCE)
