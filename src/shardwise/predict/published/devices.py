"""GPUs that published runs used (stand-in for the catalogue)."""

from __future__ import annotations

from shardwise.cluster.cluster import Device

_TABLE: dict[str, tuple[str, dict[str, float], float, float, int, float, int]] = {
    # name: family, rates TF, memory GiB, bandwidth TB/s, SMs, NVLink GB/s one way, node
    "V100": ("volta", {"fp16": 125, "float32": 15.7, "bf16": 125}, 32, 0.9, 80, 150, 8),
    "A100-40GB": ("ampere", {"fp16": 312, "bf16": 312, "tf32": 156, "float32": 19.5}, 40, 1.555, 108, 300, 8),
    "A100-80GB": ("ampere", {"fp16": 312, "bf16": 312, "tf32": 156, "float32": 19.5}, 80, 2.039, 108, 300, 8),
    "H100-80GB": (
        "hopper",
        {"fp16": 989.5, "bf16": 989.5, "tf32": 494.7, "float32": 67, "fp8": 1979},
        80,
        3.35,
        132,
        450,
        8,
    ),
    "H100-96GB": (
        "hopper",
        {"fp16": 989.5, "bf16": 989.5, "tf32": 494.7, "float32": 67, "fp8": 1979},
        96,
        2.4,
        132,
        450,
        8,
    ),
    "H200": (
        "hopper",
        {"fp16": 989.5, "bf16": 989.5, "tf32": 494.7, "float32": 67, "fp8": 1979},
        141,
        4.8,
        132,
        450,
        8,
    ),
    "GH200": (
        "hopper",
        {"fp16": 989.5, "bf16": 989.5, "tf32": 494.7, "float32": 67, "fp8": 1979},
        96,
        4.0,
        132,
        150,
        4,
    ),
    "B200": (
        "blackwell",
        {"fp16": 2250, "bf16": 2250, "tf32": 1125, "float32": 80, "fp8": 4500, "fp4": 9000},
        180,
        8.0,
        148,
        900,
        8,
    ),
    "GB200": (
        "blackwell",
        {"fp16": 2500, "bf16": 2500, "tf32": 1250, "float32": 80, "fp8": 5000, "fp4": 10000},
        186,
        8.0,
        152,
        900,
        4,
    ),
    "GB300": (
        "blackwell",
        {"fp16": 2500, "bf16": 2500, "tf32": 1250, "float32": 80, "fp8": 5000, "fp4": 15000},
        279,
        8.0,
        152,
        900,
        4,
    ),
}


def device(name: str) -> tuple[Device, float, int] | None:
    text = name.upper()
    for known in sorted(_TABLE, key=len, reverse=True):
        if all(word in text for word in known.split("-")):
            break
    else:
        for known in ("A100-80GB", "H100-80GB"):
            if known.split("-")[0] in text:
                break
        else:
            return None
    family, rates, memory, bandwidth, cores, link, node = _TABLE[known]
    return (
        Device(
            name=known,
            kind="gpu",
            flops={dtype: value * 1e12 for dtype, value in rates.items()},
            memory_bytes=memory * 2**30,
            memory_bandwidth=bandwidth * 1e12,
            cores=cores,
            launch_seconds=6e-6,
            architecture=family,
        ),
        link * 1e9,
        node,
    )
