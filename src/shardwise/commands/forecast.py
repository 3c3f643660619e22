"""Predictions of step time and memory on this machine, which a run reports beside its measurements."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from shardwise.cluster.cluster import Cluster
from shardwise.errors import NotMeasured, ShardwiseError, WorkerFailed
from shardwise.launch.context import given_threads, is_first
from shardwise.run.calibration.local_cluster import cluster_at_hand
from shardwise.run.training.result import Forecast
from shardwise.strategy import Strategy
from shardwise.workload.turns import NOT_PREDICTED
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    from shardwise.predict.profile.source import ProfileSource

FIRST_PREDICTS = "the first worker predicts"
"""Reason why the other workers of an outer launcher have no prediction."""


def forecasts(
    workload: Workload, strategies: Sequence[Strategy], threads: int | None = None, *, quiet: bool = False
) -> list[Forecast]:
    """Predict each strategy on this machine; a forecast without a prediction gives the reason.

    A run never fails because of its prediction; only a wrong cluster file is an error.

    Args:
        workload: workload to train.
        strategies: strategies to predict.
        threads: intra-op threads of each local worker; None: an even share of the cores. OMP_NUM_THREADS overrides it.
        quiet: do not print that this machine is being measured.

    Raises:
        ClusterError: the cluster file that the environment sets is wrong.
    """
    if not is_first():  # under an outer launcher, only rank 0 predicts
        return [Forecast(reason=FIRST_PREDICTS) for _ in strategies]
    if workload.turns:
        return [Forecast(reason=NOT_PREDICTED) for _ in strategies]
    try:
        cluster = own_cluster(threads, quiet=quiet)
    except (NotMeasured, WorkerFailed) as error:
        return [Forecast(reason=str(error)) for _ in strategies]
    from shardwise.predict.simulate import profiles_on  # slow to import, because it traces models

    cluster = cluster.importing(workload.libraries)
    profiles = profiles_on(workload, cluster)
    return [_forecast(profiles, strategy, cluster) for strategy in strategies]


def own_cluster(threads: int | None = None, *, quiet: bool = False) -> Cluster:
    """Return the cluster of this machine, with as many intra-op threads for each worker as a run will have.

    Arguments as of `forecasts`. Raises as `cluster_at_hand` does.
    """
    cluster = cluster_at_hand(quiet=quiet)
    given = given_threads() or threads
    return cluster if given is None else _with_threads(cluster, given)


def _forecast(profiles: ProfileSource, strategy: Strategy, cluster: Cluster) -> Forecast:
    from shardwise.predict.simulate import simulate

    if strategy.workers > cluster.size:
        return Forecast(
            reason=f"this machine was measured with {cluster.size} workers, {strategy} needs {strategy.workers}: "
            f"run shardwise calibrate --workers {strategy.workers}"
        )
    try:
        prediction = simulate(profiles, strategy, cluster)
    except ShardwiseError as error:
        return Forecast(reason=str(error))
    except Exception as error:  # the model can be trained, but not traced without its data
        return Forecast(reason=f"{type(error).__name__}: {error}")
    return Forecast.of(prediction)


def _with_threads(cluster: Cluster, threads: int) -> Cluster:
    """Return the cluster with `threads` intra-op threads for each worker on a CPU."""
    nodes = tuple(
        replace(each, device=replace(each.device, threads=threads)) if each.device.kind == "cpu" else each
        for each in cluster.nodes
    )
    return replace(cluster, nodes=nodes)
