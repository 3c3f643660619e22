"""Cluster files: exact both ways, and one clear line for whatever is wrong in one."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import pytest

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve, Level, Nodes, Sample
from shardwise.cluster.toml_reader import read_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.errors import ClusterError

FILE = """\
name = "two kinds"

[devices.big]
name = "Big"
kind = "gpu"
memory_bytes = 85899345920
memory_bandwidth = 2e12
cores = 108
launch_seconds = 5e-6
flops = { bf16 = 312e12 }
host_memory_bytes = 137438953472
host_memory_bandwidth = 5e10
host_bandwidth = 2.5e10

[devices.small]
name = "Small"
kind = "cpu"
memory_bytes = 1000
memory_bandwidth = 1e10
cores = 2
launch_seconds = 0
flops = { float32 = 1e11 }
price_per_hour = 0.5
shared = { 2 = 1.5 }
process = { module = 1000000, graph = 2000000 }
heap = 1.5
origins = { flops = "measured" }

[[devices.small.curves]]
kind = "matmul"
dtype = "float32"
samples = [[1, 64, 64, 64, 1e-6, 0.1]]

[[nodes]]
device = "big"
devices = 8
count = 2

[[nodes]]
device = "small"
devices = 1
count = 3

[[levels]]
name = "nvlink3"
span = 8
bandwidth = 300e9
latency = 2e-6

[[levels]]
name = "ethernet"
span = 19
bandwidth = 1e9
latency = 5e-5

[[collectives]]
operation = "all_reduce"
ranks = 2
nodes = 1
samples = [[4096, 1e-4, 0.1]]
"""


def read(text: str, folder: Path) -> Cluster:
    path = folder / "cluster.toml"
    path.write_text(text)
    return read_cluster(path)


def everything() -> Cluster:
    """A cluster with every field, and numbers that are hard to write."""
    curve = KernelCurve(
        "attention", "bf16", (Sample((1, 2, 3, 4, 5), 1 / 3, 2 / 3),), operation="a", backward=True, workers=4
    )
    device = Device(
        name='Näme "quoted" \\ #1',
        kind="cpu",
        flops={"float32": 1e11 / 3, "bf16": 5e-324},
        memory_bytes=2**53 + 1,
        memory_bandwidth=1.7976931348623157e308,
        cores=2,
        launch_seconds=0.1 + 0.2,
        architecture="zen",
        price_per_hour=0.0,
        curves=(curve, replace(curve, backward=False, workers=1, samples=())),
        shared={2: 1.1, 4: 2.3},
        overlap=1.07,
        origins={"flops": "measured", "price_per_hour": "assumed"},
        source="line one\nline two\ttab \x7f",
    )
    level = Level(name="a", span=4, bandwidth=1 / 7, latency=0.0, origins={"latency": "fitted"}, source="s")
    return Cluster(
        name="",
        nodes=(Nodes(device, 2, 2), Nodes(replace(device, cores=3), 1, 1), Nodes(device, 1, 1)),
        levels=(level, replace(level, name="b", span=6)),
        collectives=(CollectiveCurve("send", 2, 1, (Sample((4096,), 1e-5, 0.0), Sample((8192,), 2e-5, 0.25))),),
        software={"torch": "2.13.0+cpu", "odd key.": "x"},
    )


def test_round_trip_is_exact(tmp_path: Path) -> None:
    cluster = replace(everything(), name="all")
    write_cluster(cluster, tmp_path / "deep" / "cluster.toml")
    assert read_cluster(tmp_path / "deep" / "cluster.toml") == cluster
    assert os.listdir(tmp_path / "deep") == ["cluster.toml"]


def test_two_kinds_of_nodes(tmp_path: Path) -> None:
    cluster = read(FILE, tmp_path)
    assert cluster.size == 19
    assert cluster.node_size == 1
    assert [cluster.device(rank).name for rank in (0, 15, 16, 18)] == ["Big", "Big", "Small", "Small"]
    assert cluster.device(0).price_per_hour is None
    assert cluster.device(16).shared == {2: 1.5}
    assert cluster.device(16).process == {"module": 1000000, "graph": 2000000}
    assert (cluster.device(0).heap, cluster.device(16).heap) == (1.0, 1.5)
    assert cluster.device(16).curves[0].samples == (Sample((1, 64, 64, 64), 1e-6, 0.1),)
    assert cluster.collectives[0].samples == (Sample((4096,), 1e-4, 0.1),)
    write_cluster(cluster, tmp_path / "again.toml")
    assert read_cluster(tmp_path / "again.toml") == cluster


def test_file_is_readable(tmp_path: Path) -> None:
    write_cluster(read(FILE, tmp_path), tmp_path / "again.toml")
    text = (tmp_path / "again.toml").read_text()
    assert '[devices.big]\nname = "Big"\n' in text
    assert "memory_bandwidth = 2000000000000.0  # bytes per second\n" in text
    assert "    [1, 64, 64, 64, 1e-06, 0.1],\n" in text


WRONG = [
    (
        "memory_bandwidth = 2e12\n",
        "",
        "devices.big.memory_bandwidth is missing: must be a number above 0 (bytes per se",
    ),
    (
        "memory_bandwidth = 2e12",
        "memory_bandwith = 2e12",
        "memory_bandwith is not known; did you mean 'memory_bandwidth'",
    ),
    ("memory_bandwidth = 2e12", "memory_bandwith = 2e12", "(a number above 0 (bytes per second))"),
    (
        "memory_bandwidth = 2e12",
        "memory_bandwidth = -2e12",
        "= -2000000000000.0: must be a number above 0 (bytes per sec",
    ),
    ("memory_bandwidth = 2e12", "memory_bandwidth = 0", "memory_bandwidth = 0: must be a number above 0"),
    ("memory_bandwidth = 2e12", "memory_bandwidth = nan", "memory_bandwidth = nan: must be a number"),
    ("memory_bandwidth = 2e12", "memory_bandwidth = inf", "memory_bandwidth = inf: must be a number"),
    ("memory_bandwidth = 2e12", "memory_bandwidth = true", "memory_bandwidth = true: must be a number"),
    ("memory_bandwidth = 2e12", 'memory_bandwidth = "2e12"', 'memory_bandwidth = "2e12": must be a number'),
    ("memory_bytes = 1000", "memory_bytes = 1000.5", "devices.small.memory_bytes = 1000.5: must be a whole number"),
    ("launch_seconds = 0\n", "launch_seconds = -1\n", "= -1: must be a number from 0 on (seconds to start one kernel)"),
    ('kind = "gpu"', 'kind = "tpu"', 'devices.big.kind = "tpu": must be one of gpu, cpu'),
    ('name = "Big"', 'name = ""', 'devices.big.name = "": must be a text'),
    ("{ bf16 = 312e12 }", "{ fp17 = 312e12 }", "devices.big.flops.fp17 is not known: dtypes are float64"),
    (
        "{ bf16 = 312e12 }",
        "{ bf16 = -1 }",
        "devices.big.flops.bf16 = -1: must be a number above 0 (dense operations per",
    ),
    ("{ bf16 = 312e12 }", "{ }", "devices.big.flops is empty"),
    (
        "{ bf16 = 312e12 }",
        "312e12",
        "flops = 312000000000000.0: must be a table of dtype = dense operations per second",
    ),
    ("{ module = 1000000", "{ modul = 1000000", "process.modul is not known: programs are module, sharded, gr"),
    (
        "{ module = 1000000",
        "{ module = -1",
        "process.module = -1: must be a whole number from 0 on (bytes of a worker's",
    ),
    (
        "heap = 1.5",
        "heap = 0.5",
        "heap = 0.5: must be a number from 1 on (bytes of the process for",
    ),
    ("{ 2 = 1.5 }", "{ two = 1.5 }", "devices.small.shared.two is not a number of workers"),
    ("{ 2 = 1.5 }", "{ 2 = -1.5 }", "devices.small.shared.2 = -1.5: must be a number from 0 on (times slower)"),
    ("price_per_hour = 0.5", "price_per_hour = -0.5", "= -0.5: must be a number from 0 on (US dollars per hour)"),
    (
        'flops = "measured"',
        'flops = "guessed"',
        'origins.flops = "guessed": must be one of measured, datasheet, fitted,',
    ),
    ('flops = "measured"', 'flop = "measured"', "origins.flop is not known: fields are"),
    (
        'device = "small"',
        'device = "smal"',
        "nodes[1].device = \"smal\": must be one of big, small; did you mean 'small'?",
    ),
    ("devices = 8", "devices = 0", "nodes[0].devices = 0: must be a whole number above 0 (devices in a node)"),
    ("count = 3\n", "", "nodes[1].count is missing: must be a whole number above 0 (nodes)"),
    ("latency = 5e-5\n", "", "levels[1].latency is missing: must be a number from 0 on (seconds of an empty message)"),
    (
        "bandwidth = 1e9",
        "bandwidth = -1e9",
        "levels[1].bandwidth = -1000000000.0: must be a number above 0 (bytes per sec",
    ),
    ("span = 19", "span = 18", "levels[1].span = 18: the outermost must span all 19 devices"),
    ("span = 8", "span = 19", "levels have spans [19, 19] (devices): must ascend"),
    (
        "[[1, 64, 64, 64, 1e-6, 0.1]]",
        "[[1, 64, 64, 64, -1e-6, 0.1]]",
        "curves[0].samples[0] has -1e-06: must be a number",
    ),
    ("[[1, 64, 64, 64, 1e-6, 0.1]]", "[[1, 6.4, 64, 64, 1e-6, 0.1]]", "samples[0] has 6.4: must be a whole number"),
    ("[[1, 64, 64, 64, 1e-6, 0.1]]", "[3]", "samples[0] = 3: must be a row of [batch, m, n, k, seconds, spread"),
    ("[[1, 64, 64, 64, 1e-6, 0.1]]", "[[64, 1e-6, 0.1]]", "[64, 1e-06, 0.1]: must be a row of [batch, m, n, k, seco"),
    ('kind = "matmul"', 'kind = "matmull"', "must be one of matmul, attention, convolution, memory; did you mean"),
    ('kind = "matmul"', 'kind = "matmul"\nworkers = 0', "workers = 0: must be a whole number above 0 (workers of one"),
    ('operation = "all_reduce"', 'operation = "allreduce"', "did you mean 'all_reduce'?"),
    ("[[4096, 1e-4, 0.1]]", "4096", "collectives[0].samples = 4096: must be rows of [bytes, seconds, spread]"),
    ('name = "two kinds"', 'nam = "two kinds"', "nam is not known; did you mean 'name'? (a text (for people))"),
    ('name = "two kinds"', 'name = "two kinds', "is not TOML: "),
    ('name = "two kinds"', "name = 3", "name = 3: must be a text (for people)"),
    (
        'name = "two kinds"',
        'name = "two kinds"\nsoftware = { torch = 2 }',
        "software.torch = 2: must be a text (a version)",
    ),
]


@pytest.mark.parametrize(("right", "wrong", "said"), WRONG, ids=[f"{wrong or right}" for right, wrong, _ in WRONG])
def test_what_is_wrong_is_said_in_one_line(right: str, wrong: str, said: str, tmp_path: Path) -> None:
    assert right in FILE
    with pytest.raises(ClusterError) as error:
        read(FILE.replace(right, wrong, 1), tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path / 'cluster.toml'}: ")
    assert said in message
    assert "\n" not in message
    assert error.value.exit_status == 2


@pytest.mark.parametrize("table", ["levels", "nodes", "devices.big"])
def test_missing_tables(table: str, tmp_path: Path) -> None:
    kept = [part for part in FILE.split("\n\n") if not part.strip("[]").startswith(table)]
    with pytest.raises(ClusterError, match=table.split(".")[0]):
        read("\n\n".join(kept), tmp_path)


def test_not_a_file(tmp_path: Path) -> None:
    with pytest.raises(ClusterError, match="is a folder: give a regular file"):
        read_cluster(tmp_path)
    (tmp_path / "binary.toml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ClusterError, match="is not text in UTF-8"):
        read_cluster(tmp_path / "binary.toml")


def test_what_cannot_be_written_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ClusterError, match="cannot be written"):
        write_cluster(everything(), tmp_path / "file" / "cluster.toml")

    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    (tmp_path / "cluster.toml").write_text("before")
    monkeypatch.setattr(os, "replace", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_cluster(everything(), tmp_path / "cluster.toml")
    assert sorted(os.listdir(tmp_path)) == ["cluster.toml", "file"]
    assert (tmp_path / "cluster.toml").read_text() == "before"
