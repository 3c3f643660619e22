"""Prediction of strategies whose replicas have unequal shares of the batch: the slowest replica decides.

Each replica is predicted as if all replicas had its number of samples, on the slowest of its own devices. Replicas with
equal shares on equal devices are predicted once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Protocol

from shardwise.cluster.cluster import Cluster, Device
from shardwise.errors import StrategyError
from shardwise.options import EQUAL, FLOAT32, dtype_of
from shardwise.predict.closed_form.step_time import costs_of, predict
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.profile import Profile
from shardwise.strategy import Strategy


class ProfileOf(Protocol):
    """Source of profiles, such as `Profiles.of` and `ScaledProfiles.of`."""

    def __call__(self, strategy: Strategy, batch_size: int = 0) -> Profile:
        """Return the profile for a strategy and a global batch size; 0 selects the workload's."""


def predict_shares(profile_of: ProfileOf, strategy: Strategy, cluster: Cluster, batch_size: int) -> Prediction:
    """Predict one step of a strategy with or without unequal shares.

    Args:
        profile_of: source of profiles.
        strategy: the strategy, with or without `shares`.
        cluster: the cluster to train on.
        batch_size: global batch size.

    Raises:
        StrategyError, RequestError: as `step_time.predict` does.
    """
    if not strategy.shares:
        return predict(profile_of(strategy), strategy, cluster, batch_size)
    settled = strategy.for_batch(batch_size)
    found = [replica(profile_of, settled, cluster, *each) for each in sorted(_different(settled, cluster, batch_size))]
    slowest = max(found, key=lambda each: each.step_seconds)
    fullest = max(found, key=lambda each: each.memory.total / each.memory_available)
    return replace(
        slowest,
        memory=fullest.memory,
        memory_available=fullest.memory_available,
        model_flops=slowest.model_flops * batch_size / slowest.samples,
        samples=batch_size,
    )


def replica(profile_of: ProfileOf, strategy: Strategy, cluster: Cluster, samples: int, rank: int) -> Prediction:
    """Predict a step as if all replicas had `samples` samples per microbatch, on the device of `rank`."""
    plain, size = strategy.with_(shares=EQUAL), samples * strategy.microbatches * strategy.replicas
    device = cluster.device(rank)
    costs = costs_of(profile_of(plain, size), plain, cluster, size, device)
    return replace(
        costs.prediction(), memory_available=cluster.memory_for_worker(device, min(strategy.workers, cluster.node_size))
    )


def _different(strategy: Strategy, cluster: Cluster, batch_size: int) -> set[tuple[int, int]]:
    """Return (samples per microbatch, rank of the slowest device) of each kind of replica."""
    groups: dict[tuple[int, int], int] = {}
    for number in range(strategy.replicas):
        rank = slowest_rank(strategy, cluster, number)
        groups.setdefault((strategy.samples_of(number, batch_size), id(cluster.device(rank))), rank)
    return {(samples, rank) for (samples, _), rank in groups.items()}


def slowest_rank(strategy: Strategy, cluster: Cluster, number: int) -> int:
    """Return the rank of a replica's slowest device, which its other ranks wait for."""
    dtype = dtype_of(strategy.precision or FLOAT32)

    def rate(rank: int) -> float:
        device: Device = cluster.device(rank)
        return device.flops.get(dtype, max(device.flops.values()))

    return min(_ranks(strategy, number), key=rate)


def _ranks(strategy: Strategy, number: int) -> Iterator[int]:
    """Yield all ranks of one replica."""
    row, column = divmod(number, strategy.fsdp)
    for pipeline_rank in range(strategy.pp):
        for shard in range(strategy.tp):
            yield strategy.rank(dp=row, fsdp=column, pp=pipeline_rank, tp=shard)


def refuse_shares(strategy: Strategy, what: str) -> None:
    """Raise StrategyError if a strategy has unequal shares, for the feature `what`, which does not support them."""
    if strategy.shares:
        raise StrategyError(
            f"shares={strategy.shares}: {what} knows equal shares only; leave it out, or leave out shares"
        )
