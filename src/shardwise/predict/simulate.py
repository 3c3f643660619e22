"""Predictions for several strategies of one workload on one cluster: what `shardwise simulate` computes."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shardwise.cluster.cluster import Cluster, Level
from shardwise.errors import RequestError, StrategyError, WorkloadError
from shardwise.predict.closed_form.segment_times import slowest
from shardwise.predict.closed_form.unequal_shares import predict_shares, refuse_shares
from shardwise.predict.crosscheck import Crosscheck, crosscheck
from shardwise.predict.document import document
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.runtime.profiles import profiles_by
from shardwise.predict.runtime.runtime import SHARDWISE
from shardwise.predict.runtime.software import abilities_of
from shardwise.predict.timeline.timeline import Timeline, timeline
from shardwise.strategy import Strategy
from shardwise.workload.turns import NOT_PREDICTED
from shardwise.workload.workload import Workload


@dataclass(frozen=True, slots=True)
class Simulated:
    """Result of `simulation`.

    Attributes:
        document: the document to print, see `predict.document`.
        timelines: strategy -> its simulated step, operation by operation; empty if the closed form was used.
        profiles: the profiles that it was computed from.
    """

    document: dict[str, Any]
    timelines: Mapping[str, Timeline]
    profiles: ProfileSource


def simulation(
    workload: Workload,
    strategies: Sequence[Strategy],
    cluster: Cluster,
    *,
    play: bool = False,
    slowed: Mapping[int, float] | None = None,
    dry: bool = False,
    runtime: str = SHARDWISE.name,
) -> Simulated:
    """Predict several strategies; those that are not possible are listed as rejected.

    Args:
        workload: the workload to train.
        strategies: the strategies to predict.
        cluster: the cluster to train on.
        play: whether to simulate steps as events instead of using the closed form.
        slowed: rank -> factor by which its compute takes longer than usual (a straggler); implies `play`.
        dry: whether to dry-run the strategies, too, and compare memory, messages and time; see `predict.crosscheck`.
        runtime: software that trains the workload, one of `runtime.software.RUNTIMES`.

    Raises:
        RequestError: none of the strategies is possible; the error is that of the first one.
    """
    start = time.perf_counter()
    check_own(runtime, {"--trace": play, "--slow": bool(slowed), "--dry-run": dry})
    profiles = profiles_on(workload, cluster, runtime)
    predictions: list[tuple[str, Prediction]] = []
    timelines: dict[str, Timeline] = {}
    judgements: dict[str, Crosscheck] = {}
    rejected: list[tuple[str, str]] = []
    refusal: RequestError | None = None
    for strategy in strategies:
        try:
            if dry:
                _check_size(strategy, cluster)
                refuse_shares(strategy, "--dry-run")
                judgements[str(strategy)] = crosscheck(profiles, strategy, cluster, timed=True)
            if play or slowed:
                timelines[str(strategy)] = played(profiles, strategy, cluster, slowed or {})
                predictions.append((str(strategy), timelines[str(strategy)].prediction))
            else:
                predictions.append((str(strategy), simulate(profiles, strategy, cluster)))
        except RequestError as error:
            refusal = refusal or error
            rejected.append((str(strategy), str(error)))
    if refusal is not None and not predictions:
        raise refusal
    found = document(workload.name, cluster.name, predictions, rejected, time.perf_counter() - start, workload.notes)
    found["runtime"] = runtime
    found["links"] = [link_document(level) for level in cluster.levels]
    found["slowed"] = {str(rank): times for rank, times in (slowed or {}).items()}
    for candidate in found["candidates"] if dry else ():
        candidate["dry_run"] = judgements[candidate["strategy"]].document()
    return Simulated(found, timelines, profiles)


def link_document(level: Level) -> dict[str, Any]:
    """Return the JSON object of a level of links: the devices that it spans, bandwidth and latency."""
    return {
        "name": level.name,
        "devices": level.span,
        "bytes_per_second": level.bandwidth,
        "latency_seconds": level.latency,
        "origins": dict(level.origins),
    }


def profiles_on(workload: Workload, cluster: Cluster, runtime: str = SHARDWISE.name) -> ProfileSource:
    """Return the source of a workload's profiles for the kind of a cluster's slowest device, `gpu` or `cpu`.

    Args:
        workload: the workload.
        cluster: the cluster.
        runtime: software that trains the workload, one of `runtime.software.RUNTIMES`.

    Raises:
        RequestError: no software has this name, or it is not known on CPUs.
        WorkloadError: the steps of the workload have turns, or the software cannot train it.
    """
    abilities = abilities_of(runtime)
    if workload.turns:
        raise WorkloadError(f"workload {workload.name!r}: {NOT_PREDICTED}")
    device = slowest(cluster, workload.precision)
    if abilities is None:
        return Profiles(workload, device.kind)
    if device.kind != "gpu":
        raise RequestError(
            f"runtime={runtime}: predicted on GPUs alone, {cluster.name} has CPUs: use --cluster h100x8, say, or "
            "--runtime shardwise"
        )
    return profiles_by(abilities, workload, hopper="fp8" in device.flops)


def check_own(runtime: str, asked: Mapping[str, bool]) -> None:
    """Check that options which only Shardwise's own program has are not asked of other software.

    Args:
        runtime: name of the software.
        asked: option -> whether the user gave it.

    Raises:
        RequestError: no software has this name, or one of the options is given.
    """
    abilities = abilities_of(runtime)
    given = [option for option, is_given in asked.items() if is_given]
    if given and abilities is not None:
        raise RequestError(
            f"{given[0]} is of Shardwise's own program, not of {abilities.title}: leave it out, or use "
            "--runtime shardwise"
        )


def simulate(profiles: ProfileSource, strategy: Strategy, cluster: Cluster) -> Prediction:
    """Predict one strategy in closed form, on the first devices of the cluster.

    Raises:
        StrategyError: it needs more devices than the cluster has, or is not possible for this model and batch, or for
            the software.
    """
    return simulate_batch(profiles, strategy, cluster, profiles.workload.batch_size)


def simulate_batch(profiles: ProfileSource, strategy: Strategy, cluster: Cluster, batch_size: int) -> Prediction:
    """Predict one strategy as `simulate` does, with another global batch size than the workload's.

    Raises:
        StrategyError: as `simulate` does.
    """
    _check_size(strategy, cluster)
    refusal = None if profiles.software is None else profiles.software.refusal(strategy)
    if refusal is not None:
        raise StrategyError(refusal)

    def profile_of(strategy: Strategy, batch_size: int = batch_size) -> Profile:
        return profiles.of(strategy, batch_size)

    return predict_shares(profile_of, strategy, cluster, batch_size)


def played(profiles: ProfileSource, strategy: Strategy, cluster: Cluster, slowed: Mapping[int, float]) -> Timeline:
    """Simulate a step of one strategy, operation by operation.

    Raises:
        StrategyError: as `simulate`, or a rank in `slowed` does not exist.
    """
    _check_size(strategy, cluster)
    refuse_shares(strategy, "a step that is played")
    for rank in slowed:
        if rank >= strategy.workers:
            raise StrategyError(f"strategy {strategy} has ranks 0 to {strategy.workers - 1}: there is no rank {rank}")
    return timeline(profiles.of(strategy), strategy, cluster, slowed=slowed)


def _check_size(strategy: Strategy, cluster: Cluster) -> None:
    if strategy.workers > cluster.size:
        raise StrategyError(
            f"strategy {strategy} needs {strategy.workers} devices, {cluster.name} has {cluster.size}: "
            f"use degrees whose product is {cluster.size} or less, or a larger cluster"
        )
