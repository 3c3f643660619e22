"""Collectives over hosts in layers: which workers take part in each step, and what the steps are predicted to take."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, Level, Nodes, Sample
from shardwise.collective import Collective, Group
from shardwise.host_layers import LEAST_BYTES, host_grid, layer_steps
from shardwise.planner.explain import with_bandwidth
from shardwise.predict.hardware.network import collective_seconds as flat_seconds
from shardwise.predict.hardware.times import collective_seconds

HOST = Device(
    name="host",
    kind="cpu",
    flops={"float32": 1e11},
    memory_bytes=2**34,
    memory_bandwidth=1e10,
    cores=2,
    launch_seconds=0,
)
HOSTS = Cluster(
    name="two hosts of two",
    nodes=(Nodes(HOST, 2, 2),),
    levels=(
        Level(name="memory", span=2, bandwidth=5e9, latency=1e-5),
        Level(name="ethernet", span=4, bandwidth=1e8, latency=1e-4),
    ),
)
EVERYBODY = Group(4)
MIB = 2**20


@pytest.mark.parametrize(
    ("hosts", "grid"),
    [
        ("aabb", ((0, 1), (2, 3))),
        ("abab", ((0, 2), (1, 3))),
        ("aaa", ((0, 1, 2),)),
        ("a", ((0,),)),
        ("ab", ()),  # one worker on each
        ("aab", ()),
    ],
)
def test_workers_by_host(hosts: str, grid: tuple[tuple[int, ...], ...]) -> None:
    assert host_grid(hosts) == grid


def test_steps_of_an_all_reduce() -> None:
    whole = Collective("all_reduce", 8 * MIB, EVERYBODY, axis="dp")
    within, between, again = layer_steps(whole, node_size=2)
    assert within == replace(whole, operation="reduce_scatter", group=Group(2))
    assert between == replace(whole, bytes=4 * MIB, group=Group(2, stride=2))
    assert again == replace(whole, operation="all_gather", group=Group(2))


def test_what_does_not_run_in_layers() -> None:
    small, apart = LEAST_BYTES - 1, Group(2, stride=2)
    for each in (
        Collective("all_reduce", small, EVERYBODY),
        Collective("all_reduce", MIB, apart),
        Collective("all_reduce", MIB, Group(2)),
        Collective("broadcast", MIB, EVERYBODY),
        Collective("send", MIB, EVERYBODY),
    ):
        assert layer_steps(each, node_size=2) == ()


@pytest.mark.parametrize("operation", ["all_reduce", "reduce_scatter", "all_gather"])
def test_fewer_bytes_leave_a_host(operation: str) -> None:
    """A ring of four sends 3/4 of the bytes over the links of two workers, layers 1/2."""
    whole = Collective(operation, 64 * MIB, EVERYBODY)
    steps = sum(collective_seconds(step, HOSTS) for step in layer_steps(whole, 2))
    assert collective_seconds(whole, HOSTS) == steps
    ratio = collective_seconds(whole, HOSTS) / flat_seconds(whole, HOSTS)
    assert 2 / 3 < ratio < 0.85  # and the steps within the host


def test_gloo_alone_and_gpus_have_no_layers() -> None:
    whole = Collective("all_reduce", 64 * MIB, EVERYBODY)
    gpus = replace(HOSTS, nodes=(Nodes(replace(HOST, kind="gpu"), 2, 2),))
    for each in (replace(HOSTS, software={"backend": "gloo"}), gpus):
        assert collective_seconds(whole, each) == flat_seconds(whole, each)


def test_a_measured_size_is_taken_as_it_was_measured() -> None:
    whole = Collective("all_reduce", MIB, EVERYBODY)
    measured = CollectiveCurve("all_reduce", 4, 2, (Sample((MIB,), 0.5),))
    assert collective_seconds(whole, replace(HOSTS, collectives=(measured,))) == pytest.approx(0.5)
    other = replace(measured, ranks=2)  # that of a step
    assert collective_seconds(whole, replace(HOSTS, collectives=(other,))) > 0.25


def test_curves_of_two_levels_over_as_many_hosts_are_told_apart() -> None:
    """Four hosts of one worker, two at each switch."""
    near, far = (Level(name=name, span=span, bandwidth=1e9, latency=1e-6) for name, span in (("near", 2), ("far", 4)))
    curves = [
        CollectiveCurve("all_reduce", 2, 2, (Sample((1024,), 0.1), Sample((MIB,), seconds)), 1, level)
        for level, seconds in (("near", 0.5), ("far", 2.1))
    ]
    cluster = Cluster(
        name="switches",
        nodes=(Nodes(HOST, 1, 4),),
        levels=(near, far),
        collectives=tuple(curves),
        software=HOSTS.software,
    )
    within, between = (Collective("all_reduce", MIB, Group(2, stride=stride)) for stride in (1, 2))
    assert collective_seconds(within, cluster) == pytest.approx(0.5)
    assert collective_seconds(between, cluster) == pytest.approx(2.1)
    faster = with_bandwidth(cluster, "far", 4)
    assert collective_seconds(within, faster) == pytest.approx(0.5)
    assert collective_seconds(between, faster) == pytest.approx(0.6)
    assert [level.bandwidth for level in faster.levels] == [1e9, 4e9]
