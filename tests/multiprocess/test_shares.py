"""Replicas with unequal shares of the batch train what one process trains, in float64."""

from __future__ import annotations

from functools import partial
from typing import Any
from unittest import mock

import pytest
from breaking import assert_noticed
from equality import check
from models import WORKLOADS, first
from pool import Pools

from shardwise.parallel.program import Program

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
