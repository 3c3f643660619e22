"""Build a cluster from measured curves, and derive from small trainings what these need beside kernels."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import torch
import torch.distributed as dist

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, KernelCurve, Level, Nodes, Origin
from shardwise.cluster.curves import ANY
from shardwise.cluster.measure import machine
from shardwise.cluster.measure.collectives import BETWEEN_HOSTS, BETWEEN_SWITCHES, WITHIN_HOST, WITHIN_SWITCH
from shardwise.cluster.measure.team import Team
from shardwise.run.calibration.trials import Footprint

MEASURED = (
    "flops",
    "memory_bandwidth",
    "launch_seconds",
    "curves",
    "shared",
    "overlap",
    "process",
    "libraries",
    "strain",
    "heap",
    "overheads",
    "spreads",
    "crowding",
    "reference_seconds",
    "reference_workers",
)
"""Fields of `Device` that a calibration measures."""


def derived(team: Team, device: Device, collectives: list[CollectiveCurve], own: Footprint) -> Cluster:
    """Build the cluster of a measured device, and derive from small trainings what these need beside kernels."""
    device = replace(
        device,
        process=own.process,
        libraries=own.libraries,
        heap=own.heap(device),
        spreads=own.spreads,
        crowding=own.crowding,
        **own.reference,
    )
    cluster = _cluster(team, device, collectives)
    device = replace(device, strain=own.strain(cluster))
    cluster = _cluster(team, device, collectives)
    return _cluster(team, replace(device, overheads=own.overheads(cluster)), collectives)


def _cluster(team: Team, device: Device, collectives: list[CollectiveCurve]) -> Cluster:
    local, hosts = min(len(host) for host in team.hosts), len(team.hosts)
    across = [curve for curve in collectives if curve.nodes > 1]
    levels = (
        _level(WITHIN_HOST, local, [curve for curve in collectives if curve.nodes == 1]),
        _level(WITHIN_SWITCH, local * team.near, [curve for curve in across if curve.level == WITHIN_SWITCH]),
        _level(
            BETWEEN_SWITCHES if team.near else BETWEEN_HOSTS,
            local * hosts,
            [curve for curve in across if curve.level != WITHIN_SWITCH],
        ),
    )
    backend = {"backend": dist.get_backend()} if dist.is_initialized() else {}
    return Cluster(
        name=f"{hosts * local} workers on {device.name}",
        nodes=(Nodes(device, local, hosts),),
        levels=tuple(level for level in levels if level is not None),
        collectives=tuple(collectives),
        software={**machine.software(), **backend},
    )


def device_of(where: torch.device, curves: list[KernelCurve], slowed: float, crowds: Mapping[int, float]) -> Device:
    """Build the device of the measured curves; its peak rates are the best ones of one worker without others."""
    alone = max((curve.workers == 1, curve.threads) for curve in curves)[1]
    own = [curve for curve in curves if (curve.workers, curve.threads) == (1, alone)]
    properties = torch.cuda.get_device_properties(where) if where.type == "cuda" else None
    origins: dict[str, Origin] = dict.fromkeys(MEASURED, "measured")
    return Device(
        name=machine.processor() if properties is None else properties.name,
        kind="cpu" if properties is None else "gpu",
        flops=_rates(own),
        memory_bytes=machine.memory_bytes() if properties is None else properties.total_memory,
        memory_bandwidth=max(s.shape[0] / s.seconds for c in own if c.operation == ANY for s in c.samples),
        cores=machine.cores() if properties is None else properties.multi_processor_count,
        launch_seconds=0.0,
        curves=tuple(curves),
        overlap=slowed,
        shared=crowds,
        origins=origins,
    )


def _rates(curves: Sequence[KernelCurve]) -> dict[str, float]:
    """Return for each dtype the highest rate of a matmul, in floating-point operations per second."""
    return {
        curve.dtype: max(2.0 * math.prod(sample.shape) / sample.seconds for sample in curve.samples)
        for curve in curves
        if curve.kind == "matmul"
    }


def _level(name: str, span: int, curves: Sequence[CollectiveCurve]) -> Level | None:
    """Build a level of links from the curves of point-to-point messages. Returns None if there are none."""
    messages = [sample for curve in curves if curve.operation == "send" for sample in curve.samples]
    if not messages:
        return None
    return Level(
        name=name,
        span=span,
        bandwidth=max(sample.shape[0] / sample.seconds for sample in messages),
        latency=min(sample.seconds for sample in messages),
        origins={"bandwidth": "measured", "latency": "measured"},
    )
