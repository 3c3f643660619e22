"""Training in bfloat16 is that of one worker in bfloat16 under every strategy, within half of its tolerance or less."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from pool import Pools

from shardwise import Strategy
from shardwise.parallel.data.ddp import ReplicatedModel
from shardwise.parallel.data.module_engine import ModuleEngine
from shardwise.parallel.tensor.communication import Exchange
from shardwise.run.verification import verify
from shardwise.run.verification.rounding import MOST
from shardwise.workload.source import Source

STRATEGIES = (
    "dp=2,microbatches=2",
    "fsdp=2",
    "fsdp=2,zero=1,recompute=full",
    "tp=2,sp=1",
    "pp=2,schedule=zero-bubble",
    "tp=2,recompute=selective",
)
LANGUAGE = Source(workload="language", settings={"tied": True, "layers": 2, "hidden": 64, "sequence": 64})


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_language_models_train_alike(precision: str) -> None:
    """Tokens that come often add up many gradients of one row; the tied table is looked up and multiplied."""
    strategies = [Strategy.parse(f"{each},precision={precision}") for each in STRATEGIES]
    for proof, _ in verify.verify(LANGUAGE, strategies, steps=2, float64=False, threads=1):
        assert proof.passed, proof.strategy
        assert proof.gradient.error < 0.02, (proof.strategy, proof.gradient)
        assert proof.gradient.error < proof.tolerance / 2, (proof.strategy, proof.gradient)


def test_convolutions_and_deep_models_train_alike() -> None:
    """The tolerance grows with depth as errors do, and stays below what would hide a missing factor of two."""
    strategies = [Strategy.parse("tp=2,precision=bf16")]
    tolerances = []
    for source in (
        Source(workload="medical", settings={"batch_size": 4}),
        Source(workload="gpt:layers=12,hidden=32,heads=4,vocabulary=256,sequence=16,batch_size=4"),
    ):
        ((proof, _),) = verify.verify(source, strategies, steps=1, float64=False, threads=1)
        assert proof.passed, (proof, proof.gradient)
        tolerances.append(proof.tolerance)
    assert tolerances[0] < tolerances[1] <= MOST


def test_batch_norms_of_replicas_take_what_is_gathered_in_bfloat16() -> None:
    strategies = [Strategy.parse("fsdp=2,precision=bf16")]
    source = Source(workload="image", settings={"model": "resnet"})
    ((proof, _),) = verify.verify(source, strategies, steps=1, float64=False, threads=1)
    assert proof.passed, proof.gradient


@contextmanager
def halved() -> Iterator[None]:
    """Halve the gradient of one layer."""
    right = ModuleEngine.forward_backward

    def wrong(self: Any, *given: Any) -> Any:
        loss = right(self, *given)
        layer = next(name for name in self.parameters if name.startswith("blocks.1.") and name.endswith("out.weight"))
        self.parameters[layer].grad.mul_(0.5)
        return loss

    with mock.patch.object(ModuleEngine, "forward_backward", wrong):
        yield


@contextmanager
def apart() -> Iterator[None]:
    """Let each replica keep its own gradients."""
    right = ReplicatedModel.microbatch
    with mock.patch.object(ReplicatedModel, "microbatch", lambda self, first, last: right(self, first, False)):
        yield


@contextmanager
def unsummed() -> Iterator[None]:
    """Leave out the sums of tensor parallelism in the forward pass."""
    with mock.patch.object(Exchange, "reduce", lambda self, x: x):
        yield


@pytest.mark.parametrize(("strategy", "breaking"), [("dp=2", halved), ("dp=2", apart), ("tp=2", unsummed)])
def test_faults_are_larger_than_rounding(
    workers: Pools, tmp_path: Path, strategy: str, breaking: Callable[[], Any]
) -> None:
    trials = [
        verify.StrategyTrial(
            source=LANGUAGE,
            strategy=Strategy.parse(f"{each},precision=bf16").for_batch(LANGUAGE.load().batch_size),
            steps=1,
            float64=False,
            folder=str(tmp_path),
        )
        for each in ("single", strategy)
    ]
    workers(1, verify.record, trials[0])
    assert workers(2, compared, trials[1], None)[0].passed
    assert not workers(2, compared, trials[1], breaking)[0].passed


def compared(trial: verify.StrategyTrial, breaking: Callable[[], Any] | None) -> Any:
    if breaking is None:
        return verify.compare(trial)
    with breaking():
        return verify.compare(trial)
