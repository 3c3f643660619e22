"""A loss in pieces of the tokens trains what a whole one on one process trains, on workers of every kind."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest import mock

import pytest
import torch
from breaking import assert_noticed
from equality import assert_equal, check, errors, reference, train
from models import WORKLOADS
from pool import Pools
from tiny import SIZES

from shardwise.errors import StrategyError
from shardwise.parallel.check import check_strategy
from shardwise.parallel.operators import piecewise_loss
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.gpt import gpt
from shardwise.workload.workload import Workload

AXES = (
    "single,microbatches=2",
    "dp=2",
    "fsdp=2",
    "fsdp=2,zero=1",
    "pp=2",
    "pp=2,schedule=zero-bubble",
    "tp=2",
    "tp=2,sp=1,recompute=full",
    "fsdp=2,recompute=selective",
)
BF16 = 0.02
"""Largest relative error of gradients in bfloat16, of which each has 8 bits."""


@pytest.mark.parametrize("strategy", AXES)
@pytest.mark.parametrize("name", ["tied", "smoothed"])
def test_tied_weights_and_ignored_targets(workers: Pools, name: str, strategy: str) -> None:
    check(workers, WORKLOADS[name], f"{strategy},loss_pieces=3")


def test_evaluations_and_clipping(workers: Pools) -> None:
    check(workers, WORKLOADS["separate"], "dp=2,loss_pieces=3")
    check(workers, WORKLOADS["separate"], "tp=2,loss_pieces=4")


def test_four_workers(workers: Pools) -> None:
    check(workers, WORKLOADS["tied"], "dp=2,tp=2,loss_pieces=3")
    check(workers, WORKLOADS["tied"], "tp=2,pp=2,loss_pieces=2,recompute=full")


def test_a_vocabulary_that_tp_does_not_divide(workers: Pools) -> None:
    odd = WORKLOADS["odd-vocabulary"]
    check(workers, odd, "dp=2,loss_pieces=3")
    with pytest.raises(StrategyError, match="under tp of a vocabulary that its degree divides"):
        check_strategy(odd(), Strategy.parse("tp=2,loss_pieces=3"))


def narrow() -> Workload:
    return gpt(2, 32, 4, vocabulary=256, sequence=16, batch_size=8, precision="bf16", tied=True)


@pytest.mark.parametrize("strategy", ["single", "dp=2", "fsdp=2", "pp=2", "tp=2"])
def test_bf16(workers: Pools, strategy: str) -> None:
    found = errors(
        train(workers, narrow, f"{strategy},loss_pieces=3", steps=1), reference(workers, narrow, strategy, steps=1)
    )
    assert found["loss"][0] < BF16
    assert found["gradient"][0] < BF16


@contextmanager
def last_piece_only() -> Iterator[None]:
    """Forget the gradients of the weight of all pieces but the last."""
    whole = piecewise_loss._plus_product
    with mock.patch.object(piecewise_loss, "_plus_product", lambda total, *others: whole(None, *others)):
        yield


@pytest.mark.parametrize("strategy", ["dp=2,loss_pieces=3", "tp=2,loss_pieces=3"])
def test_a_piece_that_is_forgotten_is_noticed(workers: Pools, strategy: str) -> None:
    assert_noticed(workers, WORKLOADS["tied"], strategy, last_piece_only)


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Callable[[], Workload]:
    import transformers

    folder: Path = tmp_path_factory.mktemp("llama")
    torch.manual_seed(3)
    config = transformers.LlamaConfig(**SIZES, num_key_value_heads=2, tie_word_embeddings=True)
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return partial(load_workload, str(folder), {"sequence": "16", "precision": "float32"})


@pytest.mark.parametrize("strategy", ["single", "dp=2", "fsdp=2", "pp=2", "tp=2"])
def test_a_causal_language_model_of_transformers(workers: Pools, llama: Callable[[], Workload], strategy: str) -> None:
    found = train(workers, llama, f"{strategy},loss_pieces=4", steps=2)
    assert_equal(found, reference(workers, llama, strategy, steps=2), 1e-4)
