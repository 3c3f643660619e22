"""`reduce=bf16`: replicas sum their gradients in bfloat16, and nothing else changes."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from breaking import Breaking, part_of_broken
from equality import assert_equal, errors, merge, reference, train
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise import Strategy
from shardwise.errors import StrategyError
from shardwise.parallel.data import fsdp
from shardwise.parallel.data.reducer import ExactReducer, Flat, Pending
from shardwise.parallel.program import Program
from shardwise.run.verification.verify import verify
from shardwise.workload.loading import Loading
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

WIDTH, MICROBATCHES, SMALL = 16, 8, 0.003
"""SMALL is too small to change 1 in bfloat16, but not MICROBATCHES times."""

TOLERANCE = 6e-3


def work() -> Workload:
    """Gradients of one large microbatch and many small ones; a layer whose gradient is reduced by itself."""
    scale = torch.full((4 * MICROBATCHES, 1), SMALL)
    scale[:4] = 1.0
    return Workload(
        name="small gradients",
        model=lambda: nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False), nn.Linear(WIDTH, WIDTH, bias=False)),
        dataset=TensorDataset(scale.expand(-1, WIDTH).clone()),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: output.mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1e-6),
        batch_size=4 * MICROBATCHES,
        loading=Loading(shuffle=False),
        precision="bf16",
    )


ENGINES = ["dp=2", "fsdp=2", "fsdp=2,zero=1", "dp=2,fsdp=2", "dp=2,tp=2", "fsdp=2,tp=2", "fsdp=2,pp=2,zero=2"]


@pytest.mark.parametrize("strategy", ENGINES)
def test_gradients_of_a_replica_add_up_in_float32(workers: Pools, strategy: str) -> None:
    asked = f"{strategy},microbatches={MICROBATCHES},reduce=bf16"
    assert_equal(train(workers, work, asked, 1), reference(workers, work, asked, 1), TOLERANCE)


def adding_in_bfloat16(dtype: torch.dtype, group: Any, settle: Any) -> None:
    """Settle the dtypes of a group as torch's policy does."""
    settle()
    group._reduce_dtype = dtype
    for part in group.fsdp_params:
        part.reduce_dtype = None


def summing(reducer: ExactReducer, flat: Tensor, what: Flat, *, mean: bool) -> Pending:
    return right(reducer, flat.mul_(2), what, mean=mean)


right = ExactReducer.all_reduce


@pytest.mark.parametrize(
    ("strategy", "breaking"),
    [
        ("fsdp=2,pp=2", lambda: mock.patch.object(fsdp, "_reduce_in", adding_in_bfloat16)),
        ("dp=2", lambda: mock.patch.object(ExactReducer, "all_reduce", summing)),
    ],
)
def test_what_is_wrong_is_noticed(workers: Pools, strategy: str, breaking: Breaking) -> None:
    """Passes that add up in bfloat16, and a sum in place of a mean."""
    asked = f"{strategy},microbatches={MICROBATCHES},reduce=bf16"
    parts = workers(Strategy.parse(asked).workers, part_of_broken, breaking, work, asked)
    assert errors(merge(parts), reference(workers, work, asked))["gradient"][0] > 2 * TOLERANCE


def rounded(program: Program) -> bool:
    """Return whether every gradient of this worker is a number of bfloat16 after a step on one batch."""
    program.step(next(iter(torch.utils.data.DataLoader(program.workload.dataset, batch_size=32))))
    gradients = [p.grad for p in program.engine.parameters.values() if p.grad is not None]
    local: list[Tensor] = [each.to_local() if hasattr(each, "to_local") else each for each in gradients]
    return all(torch.equal(each, each.bfloat16().float()) for each in local)


def built(strategy: str) -> bool:
    return rounded(Program.build(work(), Strategy.parse(strategy)))


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "fsdp=2,zero=1", "dp=2,tp=2", "dp=2,fsdp=2"])
def test_replicas_sum_in_bfloat16(workers: Pools, strategy: str) -> None:
    count = Strategy.parse(strategy).workers
    assert all(workers(count, built, f"{strategy},microbatches=1,reduce=bf16"))
    assert not any(workers(count, built, f"{strategy},microbatches=1"))


@pytest.mark.usefixtures("warm_workers")
def test_language_models_train_alike() -> None:
    source = Source(workload="language", settings={"tied": True, "layers": 2, "hidden": 64, "sequence": 64})
    strategies = [
        Strategy.parse(f"{each},precision=bf16,reduce=bf16")
        for each in ("dp=2,microbatches=2", "fsdp=2", "fsdp=2,zero=1,recompute=full")
    ]
    for proof, _ in verify(source, strategies, steps=2, float64=False, threads=1):
        assert proof.passed, proof.strategy
        assert proof.gradient.error < 0.02, (proof.strategy, proof.gradient)


def test_it_is_refused_where_gradients_are_not_of_bfloat16() -> None:
    for text in ("dp=2,reduce=bf16,precision=float32", "dp=2,reduce=bf16,precision=autocast", "tp=2,reduce=bf16"):
        with pytest.raises(StrategyError, match="reduce=bf16 needs"):
            Strategy.parse(text)
    with pytest.raises(StrategyError, match="reduce=bf16 needs precision=bf16, not float32"):
        Strategy.parse("dp=2,reduce=bf16").precision_of("float32")
    with pytest.raises(StrategyError, match="reduce=fp16: known are bf16"):
        Strategy.parse("dp=2,reduce=fp16")
