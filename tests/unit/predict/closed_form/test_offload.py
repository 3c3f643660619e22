"""Parameters in the memory of the host: what that costs, and when a plan comes to it."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.cluster.measure.host_link import host_of
from shardwise.cluster.measure.team import Team
from shardwise.errors import StrategyError
from shardwise.parallel.mesh import default_device
from shardwise.planner.constraints import Constraints
from shardwise.planner.explain import explanation
from shardwise.planner.search.memory_bounds import least_memory
from shardwise.planner.search.search import search
from shardwise.planner.search.space import divisors, families, members
from shardwise.planner.search.time_bounds import least_seconds
from shardwise.predict.closed_form.offload import HOST_LINK_SHARE, HOST_SHARE, fetched, updated
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.crosscheck import crosscheck
from shardwise.predict.hardware.constants import constants
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.profile.summary import summarize
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt

WORKLOAD = gpt(4, 256, 4, 2, vocabulary=1024, sequence=128, batch_size=16)


@pytest.fixture(scope="module")
def profiles() -> ScaledProfiles:
    return ScaledProfiles(Profiles(WORKLOAD, "gpu"))


@pytest.fixture(scope="module")
def cluster() -> Cluster:
    return find_cluster("h100x4")


def changed(cluster: Cluster, **fields: Any) -> Cluster:
    nodes = tuple(replace(each, device=replace(each.device, **fields)) for each in cluster.nodes)
    return replace(cluster, nodes=nodes)


def predicted(profiles: ScaledProfiles, strategy: str, cluster: Cluster) -> Any:
    parsed = Strategy.parse(strategy)
    return predict(profiles.traced.of(parsed), parsed, cluster)


def test_slices_travel_and_the_host_updates_them(profiles: ScaledProfiles, cluster: Cluster) -> None:
    device = cluster.nodes[0].device
    assert device.host_bandwidth is not None
    assert device.host_memory_bandwidth is not None
    slowed = device.host_bandwidth * HOST_LINK_SHARE
    assert fetched(1e9, device) == pytest.approx(constants().link_hop + 1e9 / slowed)
    assert updated(1e9, device) == pytest.approx(1e9 / (device.host_memory_bandwidth * HOST_SHARE))
    measured = replace(device, origins={"host_memory_bandwidth": "measured", "host_bandwidth": "measured"})
    assert updated(1e9, measured) == 1e9 / device.host_memory_bandwidth
    assert fetched(1e9, measured) == constants().link_hop + 1e9 / device.host_bandwidth

    without, with_ = (predicted(profiles, f"fsdp=4{more}", cluster) for more in ("", ",offload=1"))
    trained = sum(p.elements for p in profiles.one().parameters if p.trained)
    moved = sum(kernel.bytes for kernel in profiles.one().update.kernels) + (12 if profiles.one().clipped else 0)
    assert with_.optimizer_seconds == pytest.approx(updated(moved * trained / 4, device), rel=0.01)
    assert with_.communication_seconds > without.communication_seconds
    assert with_.memory.optimizer == 0
    assert with_.memory.total < without.memory.total
    assert "host_bandwidth" in with_.origins
    assert "host_bandwidth" not in without.origins


def test_a_slower_link_to_the_host_is_slower(profiles: ScaledProfiles, cluster: Cluster) -> None:
    fast, slow = (
        predicted(profiles, "fsdp=4,offload=1", changed(cluster, host_bandwidth=rate, launch_seconds=1e-6))
        for rate in (1e12, 1e9)
    )
    assert slow.step_seconds > 2 * fast.step_seconds


@pytest.mark.parametrize(
    "strategy",
    ["fsdp=4,offload=1", "fsdp=2,zero=2,offload=1", "dp=2,fsdp=2,microbatches=2,offload=1", "fsdp=2,pp=2,offload=1"],
)
def test_its_dry_run_needs_as_much(profiles: ScaledProfiles, cluster: Cluster, strategy: str) -> None:
    found = crosscheck(profiles.traced, Strategy.parse(strategy), changed(cluster, launch_seconds=1e-6)).document()
    assert found["bytes_agree"]
    assert found["memory_error"] < 0.05, (found["memory"], found["predicted"]["memory"])
    assert found["memory"]["optimizer"] == 0


def test_a_cpu_is_its_own_host() -> None:
    cluster = find_cluster("epyc-7763x4")
    profiles = Profiles(WORKLOAD, "cpu")
    plain, offloaded = (Strategy.parse(f"fsdp=4,precision=float32{more}") for more in ("", ",offload=1"))
    assert predict(profiles.of(plain), plain, cluster) == predict(profiles.of(offloaded), offloaded, cluster)


def test_hosts_of_which_nothing_is_known_are_refused(profiles: ScaledProfiles, cluster: Cluster) -> None:
    unknown = changed(cluster, host_bandwidth=None)
    with pytest.raises(StrategyError, match=r"nothing is known of the hosts of h100x4: write host_bandwidth of NVIDIA"):
        predicted(profiles, "fsdp=4,offload=1", unknown)
    with pytest.raises(StrategyError, match=r"offload=1 needs .* of its host's memory for each device, there are"):
        predicted(profiles, "fsdp=4,offload=1", changed(cluster, host_memory_bytes=1000))


def test_no_strategy_costs_less_than_its_bounds(profiles: ScaledProfiles, cluster: Cluster) -> None:
    constraints = Constraints(fixed={"offload": "1"})
    segments = len(profiles.one().segments)
    every = [m for f in families(4, 16, constraints, divisors(4), segments) for m in members(f, constraints)]
    assert every
    for strategy in every:
        assert strategy.offload
        assert strategy.splits_parameters
        prediction = predict(profiles.of(strategy), strategy, cluster)
        summary = summarize(profiles.of(strategy))
        assert least_seconds(summary, strategy, cluster) <= prediction.step_seconds * 1.0001, strategy
        assert least_memory(summary, strategy, cluster.device(0)) <= prediction.memory.total, strategy


@pytest.mark.usefixtures("no_context")
def test_it_is_the_last_resort(profiles: ScaledProfiles, cluster: Cluster) -> None:
    assert all(
        not each.strategy.offload for each in search(WORKLOAD, cluster, 4, Constraints(), profiles).plan.candidates
    )
    smallest = search(WORKLOAD, cluster, 4, Constraints(objective="memory"), profiles).plan.best
    assert smallest is not None
    assert not smallest.strategy.offload
    tight = Constraints(max_memory=round(0.98 * smallest.prediction.memory.total))  # it may be 1% above the least
    found = search(WORKLOAD, cluster, 4, tight, profiles)
    assert found.plan.best is not None
    assert found.plan.best.strategy.offload
    assert found.plan.best.prediction.memory.total < smallest.prediction.memory.total
    assert any(entry.kind == "memory" for entry in found.plan.rejected)
    words = " ".join(explanation(found.plan, cluster, found.profile_of))
    assert "lie in the memory of the hosts" in words
    assert "Without it nothing fits" in words

    forbidden = replace(tight, forbidden=(("offload", ""),))
    assert search(WORKLOAD, cluster, 4, forbidden, profiles).plan.best is None
    unknown = changed(cluster, host_memory_bytes=None)
    assert search(WORKLOAD, unknown, 4, tight, profiles).plan.best is None


def test_the_fastest_with_it_is_found(profiles: ScaledProfiles, cluster: Cluster) -> None:
    constraints = Constraints(fixed={"offload": "1"})
    every = [
        m
        for f in families(4, 16, constraints, divisors(4), len(profiles.one().segments))
        for m in members(f, constraints)
    ]
    best = min(predict(profiles.of(strategy), strategy, cluster).step_seconds for strategy in every)
    found = search(WORKLOAD, cluster, 4, constraints, profiles).plan.best
    assert found is not None
    assert found.prediction.step_seconds <= best * 1.01


def test_a_host_is_measured() -> None:
    found = host_of(Team(default_device()), 2**20)
    assert found["host_memory_bytes"] > 2**28
    assert found["host_memory_bandwidth"] > 1e6
    assert found["host_bandwidth"] > 1e6
