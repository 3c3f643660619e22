"""What `offload=1` costs: what `fully_shard` splits lies in the memory of the host, which also updates it.

    before each gather     this worker's slice goes to the device
    after each scatter     its slice of the gradients goes back
    the optimizer          runs on the host's processors, as fast as their memory is read and written

A CPU is its own host: there it makes no difference.
"""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster.cluster import Cluster, Device
from shardwise.errors import StrategyError
from shardwise.predict.constants import constants
from shardwise.predict.parts import Worker
from shardwise.strategy import Strategy
from shardwise.units import format_bytes

HOST_SHARE = 0.8
"""Assumed: of a host's memory bandwidth, what programs reach that only read and write (McCalpin 1995, STREAM)."""

HOST_LINK_SHARE = 0.75
"""Assumed: of the datasheet's bandwidth between host and device, what copies of page-locked memory reach."""

FIELDS = ("host_memory_bytes", "host_memory_bandwidth", "host_bandwidth")


def offloads(strategy: Strategy, device: Device) -> bool:
    """Whether anything lies elsewhere than on the device."""
    return bool(strategy.offload) and device.kind == "gpu"


def has_host(device: Device) -> bool:
    """Whether a device's host is known."""
    return not _missing(device)


def _missing(device: Device) -> list[str]:
    return [name for name in FIELDS if getattr(device, name) is None]


def check_host(strategy: Strategy, cluster: Cluster, device: Device) -> None:
    """Raises StrategyError where a strategy offloads and the cluster does not say what its hosts have."""
    if offloads(strategy, device) and (missing := _missing(device)):
        raise StrategyError(
            f"offload=1: nothing is known of the hosts of {cluster.name}: write {' and '.join(missing)} of "
            f"{device.name} into a cluster file, or leave offload out"
        )


def check_room(worker: Worker, state_bytes: float, device: Device) -> None:
    """Raises StrategyError where the host's memory does not hold what a worker keeps there."""
    parameters, gradients, elements = worker.sliced
    needed = round(parameters + gradients + elements * state_bytes)
    there = device.host_memory_bytes or 0
    if needed > there:
        raise StrategyError(
            f"offload=1 needs {format_bytes(needed)} of its host's memory for each device, there are "
            f"{format_bytes(there)}: use more devices"
        )


def left(worker: Worker) -> Worker:
    """What stays on the device: parameters that are not split, and buffers."""
    parameters, gradients, elements = worker.sliced
    return replace(
        worker,
        parameters=worker.parameters - parameters,
        trained=worker.trained - gradients,
        updated=(worker.updated[0] - elements, worker.updated[1]),
    )


def fetched(size: float, device: Device) -> float:
    """Seconds in which so many bytes go from the host to the device, or back."""
    if not size:
        return 0.0
    numbers = constants()
    assert device.host_bandwidth is not None
    share = 1.0 if device.origins.get("host_bandwidth") == "measured" else HOST_LINK_SHARE
    return numbers.link_hop + size / (device.host_bandwidth * share)


def updated(size: float, device: Device) -> float:
    """Seconds in which the host reads and writes so many bytes of its memory."""
    assert device.host_memory_bandwidth is not None
    measured = device.origins.get("host_memory_bandwidth") == "measured"
    return size / (device.host_memory_bandwidth * (1.0 if measured else HOST_SHARE))
