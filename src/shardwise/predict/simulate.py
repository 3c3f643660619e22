"""Predictions of several strategies of one workload on one cluster."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.errors import StrategyError, WorkloadError
from shardwise.predict.costs import predict
from shardwise.predict.document import document
from shardwise.predict.prediction import Prediction
from shardwise.predict.profiling import Profiles
from shardwise.predict.timing import slowest
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def simulation(workload: Workload, strategies: Sequence[Strategy], cluster: Cluster) -> dict[str, Any]:
    """The document of `simulate`, see `predict.document`.

    Raises:
        StrategyError, WorkloadError: none of the strategies can be.
    """
    start = time.perf_counter()
    profiles = profiles_on(workload, cluster)
    predictions: list[tuple[str, Prediction]] = []
    rejected: list[tuple[str, str]] = []
    refusal: StrategyError | WorkloadError | None = None
    for strategy in strategies:
        try:
            predictions.append((str(strategy), simulate(profiles, strategy, cluster)))
        except (StrategyError, WorkloadError) as error:
            refusal = refusal or error
            rejected.append((str(strategy), str(error)))
    if refusal is not None and not predictions:
        raise refusal
    return document(workload.name, cluster.name, predictions, rejected, time.perf_counter() - start)


def profiles_on(workload: Workload, cluster: Cluster) -> Profiles:
    """The profiles of a workload as the kernels of a cluster's devices run it."""
    return Profiles(workload, slowest(cluster, workload.precision).kind)


def simulate(profiles: Profiles, strategy: Strategy, cluster: Cluster) -> Prediction:
    """What one strategy costs, on the first devices of the cluster.

    Raises:
        StrategyError: it needs more devices than there are, or cannot be for this model and batch.
    """
    if strategy.workers > cluster.size:
        raise StrategyError(
            f"strategy {strategy} needs {strategy.workers} devices, {cluster.name} has {cluster.size}: "
            f"use degrees whose product is {cluster.size} or less, or a larger cluster"
        )
    return predict(profiles.of(strategy), strategy, cluster)
