"""The catalogue: complete, with sources, dense; and what its names mean."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import ORIGINS
from shardwise.cluster.find import find_cluster
from shardwise.cluster.toml_reader import read_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.errors import ClusterError

FIGURES = ("flops", "memory_bytes", "memory_bandwidth", "cores", "launch_seconds")


@pytest.mark.parametrize("name", catalogue.devices())
def test_every_figure_of_a_device_has_an_origin_and_a_source(name: str) -> None:
    device = catalogue.device(name)
    for figure in FIGURES:
        assert device.origins[figure] in ORIGINS
        said = re.search(rf"\b{figure}\b[^:;]*: ([^;]+)", device.source)
        assert said, f"{name}: source of {figure}"
        assert ("assumed" in said[1]) == (device.origins[figure] == "assumed"), f"{name}: {figure}: {said[1]}"


@pytest.mark.parametrize("name", catalogue.devices())
def test_rates_of_a_device_are_plausible(name: str) -> None:
    device = catalogue.device(name)
    rates = device.flops
    assert rates.get("fp16", 0) >= rates.get("bf16", 0) or device.kind == "cpu"
    assert rates.get("fp8", 2 * rates.get("bf16", 1)) == pytest.approx(2 * rates.get("bf16", 1), rel=0.03)
    assert rates.get("tf32", 1) <= rates.get("bf16", rates["float32"])
    assert 1e9 <= device.memory_bytes <= 2**40
    assert device.memory_bandwidth < rates["float32"]  # one value moved takes longer than one computed, everywhere


@pytest.mark.parametrize("name", catalogue.links())
def test_every_link_has_origins_and_a_source(name: str) -> None:
    link = catalogue.link(name, 8)
    assert link.span == 8
    assert set(link.origins) == {"bandwidth", "latency"}
    assert "bandwidth" in link.source
    assert "latency" in link.source


@pytest.mark.parametrize("name", catalogue.nodes())
def test_every_node_makes_clusters_and_files(name: str, tmp_path: Path) -> None:
    kind = catalogue.node(name)
    assert kind.source
    for count in {1, kind.devices, kind.devices * 90}:
        cluster = catalogue.cluster(f"{name}x{count}")
        assert cluster.size == count
        assert [level.span for level in cluster.levels[-1:]] == ([count] if count > 1 else [])
        write_cluster(cluster, tmp_path / "cluster.toml")
        assert read_cluster(tmp_path / "cluster.toml") == cluster


@pytest.mark.parametrize(
    ("name", "dtype", "rate"),
    [
        ("v100", "fp16", 125e12),
        ("a100", "bf16", 312e12),
        ("a100-40", "tf32", 156e12),
        ("h100", "bf16", 989e12),
        ("h100", "fp8", 1979e12),
        ("h100-pcie", "bf16", 756e12),
        ("h200", "bf16", 989e12),
        ("gb200", "bf16", 2500e12),
        ("b200", "bf16", 2250e12),
        ("mi300x", "bf16", 1307e12),
        ("l4", "bf16", 121e12),
        ("l40s", "bf16", 362e12),
        ("a10g", "bf16", 70e12),
        ("t4", "fp16", 65e12),
        ("rtx 4090", "bf16", 165.2e12),
    ],
)
def test_rates_are_dense(name: str, dtype: str, rate: float) -> None:
    assert catalogue.device(name).flops[dtype] == pytest.approx(rate, rel=1e-3)


@pytest.mark.parametrize(
    ("spec", "device", "devices", "count", "links"),
    [
        ("h100x1024", "NVIDIA H100 SXM5 80GB", 8, 128, {"nvlink4-nvswitch": 8, "infiniband-ndr": 1024}),
        ("h100", "NVIDIA H100 SXM5 80GB", 8, 1, {"nvlink4-nvswitch": 8}),
        ("h100x2", "NVIDIA H100 SXM5 80GB", 2, 1, {"nvlink4-nvswitch": 2}),
        ("NVIDIA A100 SXM4 80GB x 16", "NVIDIA A100 SXM4 80GB", 8, 2, {"nvlink3-nvswitch": 8, "infiniband-hdr": 16}),
        ("a100-40x8", "NVIDIA A100 SXM4 40GB", 8, 1, {"nvlink3-nvswitch": 8}),
        ("p5x16", "NVIDIA H100 SXM5 80GB", 8, 2, {"nvlink4-nvswitch": 8, "efa": 16}),
        ("gb200x144", "NVIDIA GB200 186GB", 4, 36, {"nvlink5-nvswitch": 72, "infiniband-ndr": 144}),
        ("mi300xx16", "AMD Instinct MI300X", 8, 2, {"infinity-fabric4": 8, "roce-400": 16}),
        ("rtx4090", "NVIDIA GeForce RTX 4090", 2, 1, {"pcie4": 2}),
        ("RTX_4090x4", "NVIDIA GeForce RTX 4090", 2, 2, {"pcie4": 2, "ethernet-10": 4}),
        ("v100x1", "NVIDIA V100 SXM2 32GB", 1, 1, {}),
    ],
)
def test_specifications(spec: str, device: str, devices: int, count: int, links: dict[str, int]) -> None:
    cluster = find_cluster(spec)
    (nodes,) = cluster.nodes
    assert (nodes.device.name, nodes.devices, nodes.count) == (device, devices, count)
    assert {level.name: level.span for level in cluster.levels} == links


def test_network_is_shared_by_the_devices_of_a_node() -> None:
    assert catalogue.cluster("p4dx16").levels[-1].bandwidth == pytest.approx(400e9 / 8 / 8)
    assert catalogue.cluster("dgx-h100x16").levels[-1].bandwidth == pytest.approx(50e9)
    assert catalogue.cluster("jean-zayx16").levels[-1].bandwidth == pytest.approx(4 * 100e9 / 8 / 8)


def test_price_is_of_one_device_and_assumed() -> None:
    device = catalogue.cluster("p4d").device(0)
    assert device.price_per_hour == pytest.approx(32.773 / 8)
    assert device.origins["price_per_hour"] == "assumed"
    assert catalogue.cluster("dgx-h100").device(0).price_per_hour is None


@pytest.mark.parametrize(
    ("spec", "said"),
    [
        ("h10", "did you mean 'h100'?"),
        ("h1000x8", "did you mean 'h100'?"),
        ("h100x-8", "is neither a device nor a node"),
        ("tpu-v4x8", "'tpu-v4' is neither a device nor a node"),
        ("zzz", "known devices are v100-sxm2-32, "),
        ("h100x12", "12 devices do not fill nodes of 8 (NVIDIA DGX H100); 8 or 16 would"),
        ("h100x0", "must have one device or more"),
        ("nowhere.toml", "nowhere.toml: there is no such file"),
    ],
)
def test_what_is_not_there_is_an_error_in_one_line(spec: str, said: str) -> None:
    with pytest.raises(ClusterError) as error:
        find_cluster(spec)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_unknown_device() -> None:
    with pytest.raises(ClusterError, match="device 'h10' is not in the catalogue; did you mean 'h100'"):
        catalogue.device("h10")


@pytest.mark.parametrize(
    "text",
    ["A100-80GB", "A100-40GB", "H100-80GB", "H100-96GB-HBM2e-500W", "GB200", "GB300", "GH200-96GB", "V100"],
)
def test_names_as_published_results_print_them(text: str) -> None:
    assert catalogue.device(text).name.startswith("NVIDIA " + text.split("-")[0])


SOLD_AS = {
    "mi250x": 64,
    "mi300x": 192,
    "mi325x": 256,
    "rtx-3090": 24,
    "rtx-4090": 24,
    "titan-rtx": 24,
    "rtx-2080-ti": 11,
}
"""GiB of devices whose names do not say how much memory they have."""


@pytest.mark.parametrize("name", [name for name in catalogue.devices() if catalogue.device(name).kind == "gpu"])
def test_a_gpu_has_the_memory_that_a_program_can_use(name: str) -> None:
    """Compare what torch reports with what the maker's name says: it is less."""
    device = catalogue.device(name)
    sold = SOLD_AS.get(name) or int(re.findall(r"(\d+)GB", device.name)[0])
    assert 0.9 * sold < device.memory_bytes / 2**30 < sold
