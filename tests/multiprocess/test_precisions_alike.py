"""Training in bfloat16 is that of one worker in bfloat16 under every strategy, within much less than its tolerance."""

from __future__ import annotations

import pytest

from shardwise import Strategy
from shardwise.run.verification.verify import verify
from shardwise.workload.source import Source

STRATEGIES = (
    "dp=2,microbatches=2",
    "fsdp=2",
    "fsdp=2,zero=1,recompute=full",
    "tp=2,sp=1",
    "pp=2,schedule=zero-bubble",
    "tp=2,recompute=selective",
)


@pytest.mark.parametrize("precision", ["bf16", "autocast"])
def test_language_models_train_alike(precision: str) -> None:
    """Tokens that come often add up many gradients of one row; the tied table is looked up and multiplied."""
    source = Source(workload="language", settings={"tied": True, "layers": 2, "hidden": 64, "sequence": 64})
    strategies = [Strategy.parse(f"{each},precision={precision}") for each in STRATEGIES]
    for proof, _ in verify(source, strategies, steps=2, float64=False, threads=1):
        assert proof.passed, proof.strategy
        assert proof.gradient.error < 0.02, (proof.strategy, proof.gradient)
