"""Replicas with unequal shares of the batch train what one process trains, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
from breaking import assert_noticed
from equality import Factory, check
from models import WORKLOADS, first
from pool import Pools

from shardwise.parallel.graph.graph_engine import GraphEngine
from shardwise.parallel.pipeline import divide
from shardwise.parallel.program import Program
from shardwise.splitting import balance
from shardwise.splitting.balance import Cuts
from shardwise.strategy import Strategy

STRATEGIES = (
    "dp=2,shares=3:1",
    "fsdp=2,shares=1:3",
    "fsdp=2,zero=1,shares=3:1,microbatches=2",
    "dp=2,tp=2,shares=3:1",
    "dp=2,pp=2,shares=1:3",
    "fsdp=2,tp=2,shares=6:2",
    "dp=4,shares=1:3:2:2",
)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_unequal_shares(workers: Pools, strategy: str) -> None:
    check(workers, WORKLOADS["tied"], strategy)


@pytest.mark.parametrize("strategy", ["dp=2,shares=3:1", "dp=2,tp=2,shares=1:3"])
def test_batch_norm_counts_samples(workers: Pools, strategy: str) -> None:
    check(workers, WORKLOADS["resnet"], strategy)


@pytest.mark.parametrize("strategy", ["dp=2,shares=3:1", "fsdp=2,pp=2,shares=3:1"])
def test_small_last_batches(workers: Pools, strategy: str) -> None:
    check(workers, partial(first, "smoothed", 13), strategy)


def weighed_alike() -> Any:
    """Replicas count alike, however many samples they have."""

    def scales(self: Program, share: Any) -> list[Any]:
        count = self.strategy.replicas * len(share.microbatches)
        return [self._constant(1 / count) for _ in share.microbatches]

    return mock.patch.object(Program, "_scales", scales)


def test_replicas_that_count_alike_are_noticed(workers: Pools) -> None:
    assert_noticed(workers, WORKLOADS["tied"], "dp=2,shares=3:1", weighed_alike)


def cut_of(factory: Factory, strategy: str) -> tuple[Cuts, Cuts]:
    """Return the cuts that one worker makes, and those it would make for messages of its own size.

    The first links take longer, so that a place with more to send is the fairest one, but for a second's difference.
    """
    seconds = [3.0] * 4 + [1.0] * 96
    timed = mock.patch.object(divide, "_timed", lambda step, tensors, data, used, repeats=3: seconds[: len(used)])
    slow = mock.patch.dict(balance.BYTES_PER_SECOND, cpu=1500)
    divided = mock.patch.object(divide, "divided", wraps=balance.divided)
    agreed = mock.patch.object(divide, "_of_worker_0", wraps=divide._of_worker_0)
    with timed, slow, divided as cut, agreed as exchanged:
        engine = Program.build(factory(), Strategy.parse(strategy)).engine
        assert isinstance(engine, GraphEngine)
        costs, _, *others = cut.call_args.args
        own = [place.bytes for place in exchanged.call_args.args[1]]
        alone = balance.divided(costs, own, *others, **cut.call_args.kwargs)
    return engine.division.cuts, tuple(map(tuple, alone))


def test_replicas_cut_alike(workers: Pools) -> None:
    """Though a larger share has larger messages, which may be worth another cut."""
    cuts, alone = zip(*workers(4, cut_of, WORKLOADS["tied"], "dp=2,pp=2,shares=1:3"), strict=True)
    assert len(set(cuts)) == 1
    assert len(set(alone)) == 2
