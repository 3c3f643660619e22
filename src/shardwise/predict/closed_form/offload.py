"""Costs of `offload=1`: sharded parameters lie in the memory of the host, and its processors update them.

    before each all-gather        this worker's shard is copied to the device
    after each reduce-scatter     its shard of the gradients is copied back
    optimizer                     runs on the host's processors, bound by the bandwidth of their memory

A CPU is its own host: there offloading makes no difference.
"""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster.cluster import Cluster, Device
from shardwise.errors import StrategyError
from shardwise.predict.hardware.constants import constants
from shardwise.predict.workers.holdings import Worker
from shardwise.strategy import Strategy
from shardwise.units import format_bytes

HOST_SHARE = 0.8
"""Assumed share of a host's memory bandwidth that programs reach which only read and write (McCalpin 1995, STREAM)."""

HOST_LINK_SHARE = 0.75
"""Assumed share of the datasheet's bandwidth between host and device that copies of page-locked memory reach."""

FIELDS = ("host_memory_bytes", "host_memory_bandwidth", "host_bandwidth")


def offloads(strategy: Strategy, device: Device) -> bool:
    """Return whether a strategy keeps anything in a host's memory: it offloads, and the device is a GPU."""
    return bool(strategy.offload) and device.kind == "gpu"


def has_host(device: Device) -> bool:
    """Return whether all figures of a device's host are known, which offloading needs: those in FIELDS."""
    return not _missing(device)


def _missing(device: Device) -> list[str]:
    return [name for name in FIELDS if getattr(device, name) is None]


def check_host(strategy: Strategy, cluster: Cluster, device: Device) -> None:
    """Raise StrategyError if a strategy offloads and the device lacks figures of its host."""
    if offloads(strategy, device) and (missing := _missing(device)):
        raise StrategyError(
            f"offload=1: nothing is known of the hosts of {cluster.name}: write {' and '.join(missing)} of "
            f"{device.name} into a cluster file, or leave offload out"
        )


def check_room(worker: Worker, state_bytes: float, device: Device) -> None:
    """Raise StrategyError if the host's memory is too small for a worker's offloaded parameters and their state.

    Args:
        worker: the worker, whose sharded parameters, gradients and optimizer state are offloaded.
        state_bytes: bytes of optimizer state per element.
        device: the device, with its share of the host's memory.
    """
    parameters, gradients, elements = worker.sliced
    needed = round(parameters + gradients + elements * state_bytes)
    there = device.host_memory_bytes or 0
    if needed > there:
        raise StrategyError(
            f"offload=1 needs {format_bytes(needed)} of its host's memory for each device, there are "
            f"{format_bytes(there)}: use more devices"
        )


def left(worker: Worker) -> Worker:
    """Return the worker with only what stays on the device: unsharded parameters, and buffers."""
    parameters, gradients, elements = worker.sliced
    return replace(
        worker,
        parameters=worker.parameters - parameters,
        trained=worker.trained - gradients,
        updated=(worker.updated[0] - elements, worker.updated[1]),
    )


def fetched(size: float, device: Device) -> float:
    """Return the seconds to copy `size` bytes from the host to the device, or back."""
    if not size:
        return 0.0
    numbers = constants()
    assert device.host_bandwidth is not None
    share = 1.0 if device.origins.get("host_bandwidth") == "measured" else HOST_LINK_SHARE
    return numbers.link_hop + size / (device.host_bandwidth * share)


def updated(size: float, device: Device) -> float:
    """Return the seconds in which the host reads and writes `size` bytes of its memory."""
    assert device.host_memory_bandwidth is not None
    measured = device.origins.get("host_memory_bandwidth") == "measured"
    return size / (device.host_memory_bandwidth * (1.0 if measured else HOST_SHARE))
