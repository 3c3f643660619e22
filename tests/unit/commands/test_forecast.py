"""A run is predicted from the file that the environment names, or the machine's own; else there is a reason."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve, Level, Nodes, Sample
from shardwise.cluster.measure import machine
from shardwise.cluster.toml_writer import write_cluster
from shardwise.commands.forecast import forecasts
from shardwise.errors import ClusterError, NotMeasured
from shardwise.run.calibration.local_cluster import cached_file, cluster_at_hand, keep
from shardwise.run.training.result import relative_error
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

CURVES = tuple(
    KernelCurve(kind, "float32", (Sample(shape, workers * 1e-3),), operation, workers=workers, threads=1)
    for workers in (1, 2)
    for kind, shape, operation in (("matmul", (1, 8, 8, 8), ""), ("memory", (256,), "aten.add"))
)
BOX = Cluster(
    name="box",
    nodes=(
        Nodes(
            Device(
                name="Box",
                kind="cpu",
                flops={"float32": 1e9},
                memory_bytes=2**34,
                memory_bandwidth=1e10,
                cores=2,
                launch_seconds=1e-6,
                curves=CURVES,
            ),
            2,
            1,
        ),
    ),
    levels=(Level(name="loopback", span=2, bandwidth=1e9, latency=1e-5),),
    collectives=(CollectiveCurve("all_reduce", 2, 1, (Sample((1024,), 0.05),)),),
)


def workload() -> Workload:
    return Workload(
        name="small",
        model=lambda: nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8)),
        dataset=TensorDataset(torch.randn(8, 8), torch.arange(8)),
        inputs=lambda batch: batch[0],
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batch_size=8,
    )


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user without a cache, on a machine with one thread for each worker."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.delenv("SHARDWISE_CLUSTER", raising=False)
    return tmp_path


def strategies(*texts: str) -> list[Strategy]:
    return [Strategy.parse(text) for text in texts]


def test_from_the_file_that_is_set(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cluster(BOX, home / "box.toml")
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(home / "box.toml"))
    single, double, more = forecasts(workload(), strategies("single", "dp=2", "dp=4"))
    assert single.seconds is not None
    assert double.seconds is not None
    assert 0.005 < single.seconds < 1
    assert double.seconds > single.seconds + 0.02  # kernels take twice as long, and an all-reduce is not hidden
    assert single.reason == double.reason == ""
    assert (single.memory_bytes or 0) > 0
    assert more.seconds is None
    assert "was measured with 2 workers, dp=4 needs 4: run shardwise calibrate --workers 4" in more.reason


def test_threads_that_were_not_measured(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_cluster(BOX, home / "box.toml")
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(home / "box.toml"))
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    (found,) = forecasts(workload(), strategies("single"))
    assert found.seconds is None
    assert "Box was not measured with 1 workers of 7 threads each" in found.reason


def test_a_file_of_another_transport_is_not_used(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = home / "box.toml"
    write_cluster(replace(BOX, software={"backend": "gloo"}), path)
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(path))
    monkeypatch.delenv("SHARDWISE_TRANSPORT", raising=False)
    (found,) = forecasts(workload(), strategies("dp=2"))
    assert found.seconds is None
    assert found.reason == (
        f"{path} was measured with SHARDWISE_TRANSPORT=gloo, workers use shm here: "
        f"run shardwise calibrate --out {path} again, or set SHARDWISE_TRANSPORT=gloo"
    )
    monkeypatch.setenv("SHARDWISE_TRANSPORT", "gloo")
    (found,) = forecasts(workload(), strategies("dp=2"))
    assert found.seconds is not None


def test_a_wrong_file_is_an_error(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CLUSTER", str(home / "nowhere.toml"))
    with pytest.raises(ClusterError, match=r"nowhere\.toml: there is no such file"):
        forecasts(workload(), strategies("single"))


def test_off(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDWISE_CLUSTER", "off")
    (found,) = forecasts(workload(), strategies("single"))
    assert found.seconds is found.memory_bytes is None
    assert found.reason == "this machine is not measured: SHARDWISE_CLUSTER=off"


def test_measured_once(home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[Any] = []

    def calibrated(**options: Any) -> Cluster:
        calls.append(options)
        return BOX

    monkeypatch.setattr("shardwise.run.calibration.calibrate.calibrate", calibrated)
    assert cluster_at_hand() == BOX
    assert "measuring this machine once" in capsys.readouterr().err
    assert cluster_at_hand(quiet=True) == BOX
    assert len(calls) == 1
    cached_file().write_text("damaged")
    assert cluster_at_hand(quiet=True) == BOX
    assert len(calls) == 2
    assert capsys.readouterr().err == ""
    assert cached_file().is_relative_to(home)


def test_a_disturbed_measurement_is_made_again_on_an_idle_machine(
    home: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    busy = replace(BOX, busy=1.5)
    found = [busy, BOX]
    used = [1.8, 0.0]
    monkeypatch.setattr("shardwise.run.calibration.calibrate.calibrate", lambda **options: found.pop(0))
    monkeypatch.setattr(machine, "cores", lambda: 2)
    monkeypatch.setattr("shardwise.run.calibration.local_cluster.await_quiet", lambda seconds: used.pop(0))
    assert cluster_at_hand(quiet=True) == busy
    assert capsys.readouterr().err == ""
    assert cluster_at_hand(quiet=True) == busy  # others still compute
    assert "is uncertain (other programs used 1.5 of" in capsys.readouterr().err
    assert cluster_at_hand() == BOX
    assert "measuring this machine again" in capsys.readouterr().err
    assert cluster_at_hand() == BOX
    assert not found
    assert not used


def test_under_another_launcher(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "host", "MASTER_PORT": "1"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(NotMeasured, match="run shardwise calibrate"):
        cluster_at_hand()
    keep(BOX)
    assert cluster_at_hand() == BOX
    monkeypatch.setenv("RANK", "1")
    assert forecasts(workload(), strategies("single"))[0].reason == "the first worker predicts"


def test_relative_error() -> None:
    assert relative_error(3.0, 2.0) == pytest.approx(0.5)
    assert relative_error(1.0, None) is relative_error(None, 1.0) is None


def test_memory_of_the_process(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"module": 100 * 2**20, "sharded": 120 * 2**20, "graph": 150 * 2**20}
    device = replace(BOX.device(0), process=sizes, heap=2.0)
    box = replace(BOX, nodes=(Nodes(device, 2, 1),))
    found = {}
    for name, cluster in (("tensors", BOX), ("all", box)):
        write_cluster(cluster, home / "box.toml")
        monkeypatch.setenv("SHARDWISE_CLUSTER", str(home / "box.toml"))
        found[name] = [each.memory_bytes or 0 for each in forecasts(workload(), strategies("single", "fsdp=2", "pp=2"))]
    for size, tensors, both in zip(sizes.values(), found["tensors"], found["all"], strict=True):
        assert size < both - tensors < size + tensors
