"""Tensor parallelism trains what one process trains: gradients, parameters, buffers, optimizer state, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any
from unittest import mock

import pytest
import torch
from breaking import Breaking, assert_noticed
from equality import assert_equal, check, reference, train
from models import ALL, ODDITIES, SPELLINGS, WORKLOADS, first
from pool import Pools
from random_models import random_workload

from shardwise.parallel.graph.parameters import LocalStages
from shardwise.parallel.operators.dropout import DropoutReplacements
from shardwise.parallel.operators.graph_operators import GraphOperators
from shardwise.parallel.tensor import communication, overlap
from shardwise.workload.workload import Workload

GROUPED = ("grouped", "grouped-expand", "grouped-flag", "grouped-fused", "multi-query", "multi-query-fused")


@pytest.mark.parametrize("name", SPELLINGS)
def test_every_spelling_of_attention(workers: Pools, name: str) -> None:
    check(workers, SPELLINGS[name], "tp=2")


@pytest.mark.parametrize("name", GROUPED)
def test_fewer_key_heads_than_workers(workers: Pools, name: str) -> None:
    check(workers, SPELLINGS[name], "tp=4")


@pytest.mark.parametrize("name", WORKLOADS)
def test_every_model(workers: Pools, name: str) -> None:
    check(workers, WORKLOADS[name], "tp=2")


@pytest.mark.parametrize("name", ODDITIES)
def test_what_models_do_now_and_then(workers: Pools, name: str) -> None:
    check(workers, ODDITIES[name], "tp=2")


@pytest.mark.parametrize("name", ["tied", "odd-vocabulary", "unet", "mobile", "bottlenecks"])
def test_four_workers(workers: Pools, name: str) -> None:
    check(workers, WORKLOADS[name], "tp=4")


@pytest.mark.parametrize(
    "name",
    ["chunk", "interleaved", "grouped-fused", "torch-weights", "manual", "separate", "smoothed", "encoder",
     "translator", "unet", "first-token", "shared"],
)  # fmt: skip
def test_along_the_sequence(workers: Pools, name: str) -> None:
    check(workers, ALL[name], "tp=2,sp=1")


@pytest.mark.parametrize("recompute", ["none", "1/2", "full", "selective"])
@pytest.mark.parametrize(("name", "tp"), [("separate", 2), ("tied", 4)])
def test_inputs_that_are_gathered_again(workers: Pools, name: str, tp: int, recompute: str) -> None:
    check(workers, ALL[name], f"tp={tp},sp=1,recompute={recompute}")


@pytest.mark.parametrize("recompute", ["full", "1/3", "selective"])
@pytest.mark.parametrize("name", ["tied", "encoder", "resnet"])
def test_recomputation(workers: Pools, name: str, recompute: str) -> None:
    check(workers, WORKLOADS[name], f"tp=2,recompute={recompute}")


@pytest.mark.parametrize("strategy", ["tp=2", "tp=2,microbatches=4", "tp=2,sp=1,microbatches=4"])
@pytest.mark.parametrize("name", ["tied", "smoothed", "perceptron", "encoder-tokens-first"])
def test_small_last_batches(workers: Pools, name: str, strategy: str) -> None:
    check(workers, few(name, 13), strategy)


_factories: dict[tuple[str, int], Callable[[], Workload]] = {}


def few(name: str, samples: int) -> Callable[[], Workload]:
    """One function for one workload, by which its reference is remembered."""
    return _factories.setdefault((name, samples), partial(first, name, samples))


def single(name: str) -> Workload:
    """The model in float32, as it is used."""
    workload = WORKLOADS[name]()
    return replace(workload, model=lambda: workload.model().float(), optimizer=partial(torch.optim.SGD, lr=0.1))


@pytest.mark.parametrize("strategy", ["tp=2", "tp=2,sp=1"])
def test_half_precision(workers: Pools, strategy: str) -> None:
    factory = partial(single, "tied")
    assert_equal(train(workers, factory, strategy), reference(workers, factory, strategy), 1e-5)
    half = train(workers, factory, f"{strategy},precision=bf16")
    assert_equal(half, reference(workers, factory, f"{strategy},precision=bf16"), 0.05)
    assert {tensor.dtype for tensor in half.state.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["tp=2", "tp=2,sp=1"])
@pytest.mark.parametrize("seed", range(12))
def test_random_models(workers: Pools, seed: int, strategy: str) -> None:
    check(workers, partial(random_workload, seed), strategy)


# ---- broken on purpose ----------------------------------------------------------------------------------------------


def no_reduction() -> Any:
    return mock.patch.object(communication.Exchange, "reduce", lambda self, x: x.clone())


def no_sum_of_gradients() -> Any:
    def same(self: Any, x: torch.Tensor, *_: Any) -> torch.Tensor:
        return x.view_as(x)

    return mock.patch.multiple(communication.Exchange, enter=same, enter_unawaited=same)


def dropout_by_local_place() -> Any:
    def mask(self: Any, site: int, shape: Any, p: float, placement: Any, device: Any, merged: bool) -> Any:
        local = list(shape)
        if hasattr(placement, "dim"):
            local[placement.dim] //= self.exchange.ranks
        return DropoutReplacements(self.position, site).mask(torch.Size(local), p, device, merged=merged)

    return mock.patch.object(GraphOperators, "mask", mask)


def recomputed_at_another_place() -> Any:
    @contextmanager
    def at(self: Any, position: Any, *_: Any, **options: Any) -> Any:
        current = self.position
        self.position = replace(position, step=position.step + 1)
        yield
        self.position = current

    return mock.patch.object(GraphOperators, "at", at)


def late_gradients_lost() -> Any:
    return mock.patch.object(overlap, "gradient_of_weight", lambda g, x: g.new_zeros(g.shape[-1], x.shape[-1]))


def gathered_again_in_another_order() -> Any:
    original = communication.Exchange._all_gather

    def gather(self: Any, parts: list[torch.Tensor], x: torch.Tensor, *, later: bool = False) -> Any:
        return original(self, parts[::-1] if later else parts, x, later=later)

    return mock.patch.object(communication.Exchange, "_all_gather", gather)


def parts_not_added_up() -> Any:
    return mock.patch.object(LocalStages, "_sum", return_value=None)


@pytest.mark.parametrize(
    ("name", "strategy", "breaking"),
    [
        ("tied", "tp=2", no_reduction),
        ("separate", "tp=2", no_sum_of_gradients),
        ("separate", "tp=2", late_gradients_lost),
        ("separate", "tp=2,sp=1", late_gradients_lost),
        ("separate", "tp=2,sp=1", gathered_again_in_another_order),
        ("manual", "tp=2", dropout_by_local_place),
        ("encoder", "tp=2,recompute=full", recomputed_at_another_place),
        ("separate", "tp=2,sp=1", parts_not_added_up),
    ],
)
def test_comparison_notices(workers: Pools, name: str, strategy: str, breaking: Breaking) -> None:
    assert_noticed(workers, ALL[name], strategy, breaking)
