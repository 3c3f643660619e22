"""Two workers measure what they compute and how they talk, and predictions are made of what they found."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pool import Pools
from torch.distributed import FileStore  # type: ignore[attr-defined]

from shardwise.cluster.cluster import PROGRAMS, SHAPES, Cluster, Device
from shardwise.cluster.find import find_cluster
from shardwise.cluster.measure.collectives import OPERATIONS, collective_curves, layouts, partner_of
from shardwise.cluster.measure.kernel_cases import KernelCase, all_cases
from shardwise.cluster.measure.team import Team, near
from shardwise.cluster.toml_reader import read_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.launch.shared_memory.backend import backend
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.run.calibration.assembly import derived
from shardwise.run.calibration.calibrate import Effort, summary, work
from shardwise.run.calibration.footprint import footprint
from shardwise.run.calibration.trials import Footprint, FootprintTrial, small
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload

SHORT = Effort(
    case=0.0005,
    message=0.0005,
    other=0.02,
    patience=0.0,
    dtypes=(torch.float32,),
    cases=lambda dtype: few(list(all_cases(dtype))),
)


def few(cases: list[KernelCase]) -> list[KernelCase]:
    """An odd stride, as forward and backward passes take turns; the last ones are attention of every kind."""
    return [*cases[:3], *cases[::11], *cases[-4:]]


def measure() -> Cluster | None:
    """Measure in less time than a calibration has: its numbers need not be good."""
    with mock.patch.multiple("shardwise.run.calibration.footprint", TIMED=4, TURNS=3, SECONDS=0.1):
        return work(SHORT, True, footprint())


def measure_among(count: int, rank: int, store: str, pipe: Connection) -> None:
    dist.init_process_group(backend(), store=FileStore(store, count), rank=rank, world_size=count)
    pipe.send(measure())
    dist.destroy_process_group()


def measured(count: int, store: Path) -> Cluster:
    """By workers that have done nothing before, or a traced program would seem to need no more than a module."""
    context = multiprocessing.get_context("spawn")
    pipes = [context.Pipe(duplex=False) for _ in range(count)]
    workers = [
        context.Process(target=measure_among, args=(count, rank, str(store), theirs), daemon=True)
        for rank, (_, theirs) in enumerate(pipes)
    ]
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):
        for worker, (_, theirs) in zip(workers, pipes, strict=True):
            worker.start()
            theirs.close()  # that a worker's death be told by the end of its pipe
    cluster, *others = [ours.recv() for ours, _ in pipes]
    assert others == [None] * (count - 1)
    assert isinstance(cluster, Cluster)
    return cluster


def test_two_workers_measure_and_predict(tmp_path: Path) -> None:
    cluster = measured(2, tmp_path / "store")
    device = cluster.device(0)
    assert cluster.size == cluster.node_size == 2
    assert {curve.kind for curve in device.curves} == set(SHAPES)
    assert {curve.workers for curve in device.curves} == ({1, 2} if device.cores > 1 else {1})
    assert {(curve.operation, curve.ranks, curve.nodes) for curve in cluster.collectives} == {
        (operation, 2, 1) for operation in OPERATIONS
    }
    assert device.overlap >= 1.0
    assert set(device.shared) == {2}
    assert set(device.process) == set(PROGRAMS)
    assert all(2**26 < own < 2**31 for own in device.process.values())
    assert device.process["module"] + 2**22 < device.process["graph"]  # tracing is imported for it
    assert 1.0 <= device.heap < 4.0
    assert set(device.origins.values()) == {"measured"}
    write_cluster(cluster, tmp_path / "cluster.toml")
    again = read_cluster(tmp_path / "cluster.toml")
    assert again == cluster
    profiles = profiles_on(load_workload("image", {}), again)
    for text in ("dp=2", "tp=2"):
        prediction = simulate(profiles, Strategy.parse(text), again)
        assert 1e-4 < prediction.step_seconds < 60
        assert prediction.memory.total > device.process["module" if text == "dp=2" else "graph"]
        assert prediction.origins["kernels"] == prediction.origins["collectives"] == "measured"


def test_one_worker(workers: Pools) -> None:
    cluster = workers(1, measure)[0]
    assert cluster.size == 1
    assert cluster.collectives == cluster.levels == ()
    document = summary(cluster, Path("cluster.toml"), 1.0)
    assert document["workers"] == 1
    assert document["flops"]["float32"] > 1e8
    assert document["launch_seconds"] >= 0


@pytest.mark.parametrize("hosts", [[[0, 1], [2, 3]], [[0, 1], [2, 3], [4, 5]], [[0, 1, 2], [3, 4, 5]], [[0], [1], [2]]])
def test_messages_over_hosts_leave_their_host(hosts: list[list[int]]) -> None:
    host_of = {rank: number for number, ranks in enumerate(hosts) for rank in ranks}
    for layout in layouts(hosts):
        for ranks in layout.groups:
            pairs = [(index, partner_of(index, len(ranks))) for index in range(len(ranks))]
            assert sum(other is None for _, other in pairs) == len(ranks) % 2
            for index, other in pairs:
                if other is not None:
                    assert partner_of(other, len(ranks)) == index
                    assert (host_of[ranks[index]] != host_of[ranks[other]]) == (layout.nodes > 1)


Said = tuple[tuple[str, str], ...]
"""Switch and host that each of four workers says that it has."""

TWO_SWITCHES: Said = (("east", "n1"), ("east", "n2"), ("west", "n3"), ("west", "n4"))
TWO_HOSTS: Said = (("", "n1"), ("", "n1"), ("", "n2"), ("", "n2"))


def measure_at(said: Said, device: Device) -> Cluster:
    switch, host = said[dist.get_rank()]
    with mock.patch.object(socket, "gethostname", return_value=host):
        team = Team(torch.device("cpu"), switch)
    with mock.patch("shardwise.cluster.measure.collectives.SIZES", (1024, 16 * 1024)):
        found = [
            curve
            for layout in layouts(team.hosts, team.near)
            for curve in collective_curves(team, layout, 0.0005, lambda _: None)
        ]
    nothing = Footprint({}, small(4), FootprintTrial(Strategy(dp=4), 0.0), 0, {})
    return derived(team, device, found, nothing)


@pytest.mark.parametrize(
    ("said", "levels", "curves"),
    [
        (
            TWO_SWITCHES,
            [("within a switch", 2), ("between switches", 4)],
            {(2, 2, "within a switch"), (4, 4, "between switches")},
        ),
        (TWO_HOSTS, [("within a host", 2), ("between hosts", 4)], {(2, 1, ""), (2, 2, ""), (4, 2, "")}),
    ],
    ids=["two switches", "two hosts"],
)
def test_hosts_at_two_switches_have_levels_of_their_own(
    workers: Pools, tmp_path: Path, said: Said, levels: list[tuple[str, int]], curves: set[tuple[int, int, str]]
) -> None:
    measured = workers(4, measure_at, said, find_cluster("h100x4").device(0))[0]
    assert [(level.name, level.span) for level in measured.levels] == levels
    assert {(curve.ranks, curve.nodes, curve.level) for curve in measured.collectives} == curves
    write_cluster(measured, tmp_path / "cluster.toml")
    assert read_cluster(tmp_path / "cluster.toml").collectives == measured.collectives


@pytest.mark.parametrize(
    ("switches", "expected"),
    [("aabb", 2), ("aaabbbccc", 3), ("aaaa", 0), ("abcd", 0), ("aabbb", 0), ([""] * 4, 0), (["", "", "a", "a"], 0)],
)
def test_switches_matter_if_each_has_as_many_hosts(switches: Sequence[str], expected: int) -> None:
    assert near(list(switches)) == expected


def test_layouts() -> None:
    def shapes(hosts: list[list[int]]) -> list[tuple[tuple[tuple[int, ...], ...], int]]:
        return [(layout.groups, layout.nodes) for layout in layouts(hosts)]

    assert shapes([[0]]) == []
    assert shapes([[0, 1]]) == [(((0, 1),), 1)]
    assert shapes([[0, 1, 2, 3]]) == [(((0, 1),), 1), (((0, 1), (2, 3)), 1), (((0, 1, 2, 3),), 1)]
    assert shapes([[0, 1], [2, 3]]) == [
        (((0, 1),), 1),
        (((0, 2),), 2),
        (((0, 2), (1, 3)), 2),
        (((0, 1, 2, 3),), 2),
    ]
    assert shapes([[0], [1], [2]]) == [(((0, 1, 2),), 3)]
