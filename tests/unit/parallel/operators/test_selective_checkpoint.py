"""Blocks that keep the results of their products, and compute the rest again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from shardwise.cluster.find import find_cluster
from shardwise.options import SELECTIVE
from shardwise.parallel.operators import selective_checkpoint
from shardwise.planner.constraints import Constraints
from shardwise.planner.search.search import search
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.profiler import Profiles
from shardwise.strategy import PRODUCTS, Strategy
from shardwise.workload.load import load_workload


class Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts operations by name."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


class Block(nn.Module):
    """A linear layer whose result is written into where `inplace`, then attention and a convolution."""

    def __init__(self, *, inplace: bool = False) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.wide = nn.Linear(8, 24)
        self.activation = nn.ReLU(inplace=inplace)
        self.narrow = nn.Conv1d(8, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = self.activation(self.wide(self.norm(x))).view(2, 6, 2, 12).chunk(3, dim=-1)
        mixed = F.scaled_dot_product_attention(query, key, value).reshape(2, 6, 8)
        return x + F.gelu(self.narrow(mixed.transpose(1, 2)).transpose(1, 2))


def passed(block: nn.Module, *, again: bool) -> tuple[list[Tensor], Counter[str]]:
    """(gradients, operations of forward and backward pass)."""
    torch.manual_seed(0)
    x = torch.randn(2, 6, 8, dtype=torch.float64, requires_grad=True)
    block.double().zero_grad()
    with Calls() as calls:
        result = (
            checkpoint(block, x, use_reentrant=False, context_fn=selective_checkpoint.contexts) if again else block(x)
        )
        result.square().sum().backward()
    gradients = [parameter.grad for parameter in block.parameters() if parameter.grad is not None]
    assert x.grad is not None
    return [x.grad, *gradients], calls.counts


def test_products_are_not_computed_again() -> None:
    block = Block()
    plain, once = passed(block, again=False)
    kept, twice = passed(block, again=True)
    assert all(map(torch.equal, plain, kept))
    attention = next(name for name in once if name.startswith("_scaled_dot_product") and "backward" not in name)
    assert f"aten.{attention}" in PRODUCTS
    for name in ("addmm", "convolution", "mm", attention):
        assert twice[name] == once[name], name
    assert twice["native_layer_norm"] == 2 * once["native_layer_norm"]


def test_results_that_were_written_into_are_computed_again() -> None:
    block = Block(inplace=True)
    plain, once = passed(block, again=False)
    kept, twice = passed(block, again=True)
    assert all(map(torch.equal, plain, kept))
    assert twice["addmm"] == 2 * once["addmm"]
    assert twice["convolution"] == once["convolution"]


@pytest.mark.parametrize("spec", ["single", "fsdp=4", "tp=2,pp=2"])
def test_it_costs_less_time_than_all_and_less_memory_than_nothing(spec: str) -> None:
    workload = load_workload("gpt:layers=8,hidden=2048,heads=16,vocabulary=512,sequence=1024,batch_size=16")
    profiles, cluster = Profiles(workload, "gpu"), find_cluster("a100-40x4")
    none, selected, full = (
        predict(profiles.of(strategy), strategy, cluster)
        for strategy in (Strategy.parse(spec).with_(recompute=word) for word in ("none", "selective", "full"))
    )
    assert none.step_seconds < selected.step_seconds < full.step_seconds
    assert full.memory.total < selected.memory.total < none.memory.total
    assert selected.model_flops == none.model_flops


def test_plan_takes_it_where_nothing_fits_without() -> None:
    workload = load_workload("gpt:layers=8,hidden=2048,heads=16,vocabulary=512,sequence=1024,batch_size=16")
    scaled, cluster = ScaledProfiles(Profiles(workload, "gpu")), find_cluster("a100-40x4")
    strategy = Strategy.parse("fsdp=4,recompute=selective")
    room = predict(scaled.of(strategy), strategy, cluster).memory.total
    fixed = {"fsdp": "4", "microbatches": "1", "zero": "3"}
    best = search(workload, cluster, 4, Constraints(fixed=fixed, max_memory=room), scaled).plan.best
    assert best is not None
    assert best.strategy.recompute == SELECTIVE
    forbidden = Constraints.parse(
        max_memory=str(room), fix=[f"{key}={value}" for key, value in fixed.items()], forbid=["recompute=selective"]
    )
    other = search(workload, cluster, 4, forbidden, scaled).plan.best
    assert other is not None
    assert other.strategy.recompute.partial
    # equal at least: of strategies within 1% the simpler is chosen, and a share of the blocks is not
    assert other.prediction.step_seconds > 0.99 * best.prediction.step_seconds
