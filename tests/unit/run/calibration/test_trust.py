"""A disturbed measurement of this machine is told, an impossible one refused, and more workers must pay."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from shardwise.cluster.cluster import Cluster, Device, KernelCurve, Level, Nodes, Sample
from shardwise.cluster.measure import machine
from shardwise.cluster.toml_reader import read_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.commands import auto, plan
from shardwise.errors import NotMeasured, RequestError
from shardwise.run.calibration import trust
from shardwise.run.calibration.trials import Footprint, FootprintTrial, usual
from shardwise.run.calibration.trust import trusted
from shardwise.strategy import Strategy

BOX = Device(
    name="Box",
    kind="cpu",
    flops={"float32": 1e9},
    memory_bytes=2**34,
    memory_bandwidth=1e10,
    cores=2,
    launch_seconds=1e-6,
    curves=(KernelCurve("memory", "float32", (Sample((256,), 1e-6),), "aten.add"),),
    spreads={"step": 0.1, "crowded": 0.2},
    crowding=1.1,
    process={"module": 200, "graph": 300},
    libraries={"transformers": 50},
)


def cluster_of(device: Device, busy: float = 0.0) -> Cluster:
    return Cluster(
        name="box",
        nodes=(Nodes(device, 4, 1),),
        levels=(Level(name="loopback", span=4, bandwidth=1e9, latency=1e-5),),
        busy=busy,
    )


@pytest.fixture(autouse=True)
def others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trust, "busiest", lambda: "make (process 41)")
    monkeypatch.setattr(machine, "cores", lambda: 2)


def test_an_undisturbed_measurement_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert trusted(cluster_of(BOX, 0.05)) == cluster_of(BOX, 0.05)
    assert capsys.readouterr().err == ""


def test_a_disturbed_one_says_by_whom_and_how_uncertain_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    trusted(cluster_of(BOX, 1.25))
    (line,) = capsys.readouterr().err.splitlines()
    assert "other programs used 1.2 of 2 cores, make (process 41) most" in line
    assert "20%" in line


@pytest.mark.parametrize(
    ("change", "busy", "said"),
    [
        ({"launch_seconds": 0.0}, 0.0, "a kernel needs no host time"),
        ({"shared": {2: 0.11}}, 0.0, "workers that share cores compute faster than one alone"),
        ({"strain": 2.43}, 1.25, "kernels take 2.43 times as long in a training as alone"),
        ({"overheads": {"step": 0.0}}, 1.25, "a step needs no host time"),
    ],
)
def test_an_impossible_number_is_refused(change: dict[str, Any], busy: float, said: str) -> None:
    with pytest.raises(NotMeasured, match=rf"{said}, which is impossible \(other programs used {busy:.1f} of 2 cores"):
        trusted(cluster_of(replace(BOX, **change), busy))


def test_an_error_of_the_model_is_not_refused_where_nothing_disturbed() -> None:
    cluster = cluster_of(replace(BOX, strain=2.1, overheads={"step": 0.0}, shared={2: 0.95}))
    assert trusted(cluster) == cluster


def test_the_file_keeps_how_busy_others_were_and_how_much_steps_scattered(tmp_path: Path) -> None:
    write_cluster(cluster_of(BOX, 1.25), tmp_path / "box.toml")
    assert read_cluster(tmp_path / "box.toml") == cluster_of(BOX, 1.25)


@pytest.mark.parametrize(
    ("crowding", "spread", "workers"),
    [(None, 0.0, 2), (0.8, 0.0, 2), (1.1, 0.2, 2), (1.1, 0.05, 4), (1.5, 0.2, 4)],
)
def test_more_workers_than_cores_only_if_they_were_measured_to_pay(
    crowding: float | None, spread: float, workers: int
) -> None:
    device = replace(BOX, crowding=crowding, spreads={"crowded": spread})
    assert cluster_of(device).worthwhile == workers


def test_libraries_count_in_the_processes_of_models_that_import_them() -> None:
    plain = cluster_of(BOX)
    assert plain.importing(()) is plain
    assert plain.importing(("numpy",)) is plain
    assert plain.importing(("transformers",)).device(0).process == {"module": 250, "graph": 350}


def test_devices_that_share_no_cores_are_all_planned_for() -> None:
    assert cluster_of(replace(BOX, kind="gpu", crowding=None)).worthwhile == 4
    assert cluster_of(replace(BOX, curves=(), crowding=None)).worthwhile == 4


def test_crowding_is_the_ratio_of_samples_per_second() -> None:
    large = usual(2)
    step, plain = FootprintTrial(Strategy(dp=2), 0.01, 0.05, 8), FootprintTrial(Strategy(dp=2), 0.1, 0.2, 32)
    own = Footprint({}, large, plain, 0, {"step": step, "plain": plain}, busy=0.1)
    assert own.crowding is None
    crowded = own.with_crowd(FootprintTrial(Strategy(dp=4), 0.4, 0.3, 64), 0.7)
    assert crowded.crowding == pytest.approx(0.5)
    assert crowded.spreads == {"step": 0.05, "crowded": 0.3}
    assert crowded.busy == 0.7


def test_plans_of_all_devices_leave_out_workers_that_do_not_pay(monkeypatch: pytest.MonkeyPatch) -> None:
    pays, does_not = cluster_of(replace(BOX, crowding=1.5)), cluster_of(replace(BOX, crowding=0.8))
    assert plan._numbers(None, pays) == [4]
    assert plan._numbers(None, does_not) == [2]
    assert plan._numbers(4, does_not) == [4]  # asked for
    searched: list[int] = []

    def search(workload: Any, cluster: Cluster, number: int, *_: Any) -> Any:
        searched.append(number)
        return SimpleNamespace(plan=SimpleNamespace(best=None, smallest=None, workers=number, workload="none"))

    monkeypatch.setattr(auto, "own_cluster", lambda quiet: does_not)
    for name, stand_in in (("search", search), ("profiles_on", lambda *_: None), ("ScaledProfiles", lambda _: None)):
        monkeypatch.setattr(auto, name, stand_in)
    with pytest.raises(RequestError):
        auto.choose(usual(2))
    assert searched == [1, 2]
