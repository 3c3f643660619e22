"""Predictions of step time and memory on this machine, which a run reports beside its measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import takewhile
from typing import TYPE_CHECKING, Any

from shardwise.cluster.cluster import Cluster
from shardwise.errors import NotMeasured, ShardwiseError, WorkerFailed
from shardwise.launch.context import given_threads, is_first
from shardwise.run.calibration.local_cluster import cluster_at_hand
from shardwise.run.training.result import Forecast
from shardwise.strategy import Strategy
from shardwise.workload.turns import NOT_PREDICTED
from shardwise.workload.workload import Workload

if TYPE_CHECKING:
    from shardwise.predict.prediction import Prediction
    from shardwise.predict.profile.profile import Parameter, Profile
    from shardwise.predict.profile.source import ProfileSource
    from shardwise.run.calibration.reference import Reference

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


def reference_here() -> Reference | None:
    """Return the reference training of this machine. Returns None if it was measured without one."""
    from shardwise.run.calibration.reference import Reference

    return Reference.of(cluster_at_hand(quiet=True).device(0))


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
    return Forecast.of(prediction, details(profiles.of, strategy, cluster, prediction))


def details(
    profile_of: Callable[[Strategy], Profile], strategy: Strategy, cluster: Cluster, prediction: Prediction
) -> dict[str, Any]:
    """Return the whole prediction of a strategy for reports, JSON-able: `candidate`, as in the document of `simulate`,
    and the parts of `step_parts`.
    """
    from shardwise.predict.document import candidate

    return {"candidate": candidate(str(strategy), prediction), **step_parts(profile_of, strategy, cluster)}


def step_parts(profile_of: Callable[[Strategy], Profile], strategy: Strategy, cluster: Cluster) -> dict[str, Any]:
    """Return what reports show of a predicted step beside its candidate, JSON-able.

    Returns:
        `cluster`; `timeline`, the rows of the simulated step, of which the longest `MOST_ROWS` are kept, and
        `timeline_left_out`, the number of others; `segments` of the model. Where a part cannot be computed it is empty,
        and `timeline_reason` says why.
    """
    found = {"cluster": cluster_document(cluster, strategy.workers)}
    empty: dict[str, Any] = {"timeline": [], "timeline_left_out": 0, "segments": []}
    if strategy.shares:
        return {**found, **empty, "timeline_reason": f"shares={strategy.shares}: such a step is not simulated"}
    try:
        return {**found, **_played(profile_of(strategy), strategy, cluster)}
    except Exception as error:  # a run never fails because of its prediction
        return {**found, **empty, "timeline_reason": f"{type(error).__name__}: {error}"}


def _played(profile: Profile, strategy: Strategy, cluster: Cluster) -> dict[str, Any]:
    """Return the simulated step, and the segments of the model with their stages."""
    from shardwise.predict.closed_form.step_time import costs_of
    from shardwise.predict.timeline.rows import MOST_ROWS, longest
    from shardwise.predict.timeline.timeline import timeline

    rows, left_out = longest(timeline(profile, strategy, cluster).document(), MOST_ROWS)
    stages = costs_of(profile, strategy, cluster).parts.stages.values()
    stage_of = {segment: stage.number for stage in stages for segment in range(stage.first, stage.end)}
    segments = [
        _segment([each for each in profile.parameters if each.segments[:1] == (number,)], number, stage_of[number])
        for number in range(len(profile.segments))
    ]
    return {"timeline": rows, "timeline_left_out": left_out, "segments": segments}


def _segment(parameters: Sequence[Parameter], number: int, stage: int) -> dict[str, Any]:
    """Return a segment of the model: what is common to the names of its parameters, and what one worker holds of it."""
    names = [each.name for each in parameters]
    modules = [name.split(".")[:-1] for name in names]
    common = [words[0] for words in takewhile(lambda words: len(set(words)) == 1, zip(*modules, strict=False))]
    return {
        "name": ".".join(common) or (names[0] if len(names) == 1 else f"segment {number}"),
        "parameters": sum(each.elements for each in parameters if not each.buffer),
        "bytes": sum(each.bytes for each in parameters),
        "stage": stage,
    }


def cluster_document(cluster: Cluster, workers: int) -> dict[str, Any]:
    """Return name, devices, links and usable memory of the devices that a strategy of `workers` workers uses."""
    from shardwise.predict.simulate import link_document

    device = cluster.device(0)
    return {
        "name": cluster.name,
        "devices": cluster.size,
        "used_devices": workers,
        "device": device.name,
        "kind": device.kind,
        "usable_memory_bytes": cluster.memory_for_worker(device, workers),
        "links": [link_document(level) for level in cluster.levels],
    }


def _with_threads(cluster: Cluster, threads: int) -> Cluster:
    """Return the cluster with `threads` intra-op threads for each worker on a CPU."""
    nodes = tuple(
        replace(each, device=replace(each.device, threads=threads)) if each.device.kind == "cpu" else each
        for each in cluster.nodes
    )
    return replace(cluster, nodes=nodes)
