"""Seconds of kernels and collectives on a cluster: measured where they were, else by the analytic models.

Workers that share the cores of a CPU slow each other down; how much is measured (`Device.shared`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective
from shardwise.predict import gpu, network
from shardwise.predict.kernel import Kernel


def kernel_seconds(kernel: Kernel, device: Device, workers: int = 1) -> float:
    """Seconds that a device is busy with `kernel`, all `kernel.count` of them.

    Args:
        kernel: what to compute.
        device: where; its measured curves go before the analytic model of `predict.gpu`.
        workers: that share the cores of the device.

    Raises:
        RequestError: nothing is known of the kernel's dtype on this device.
    """
    seconds = None
    if device.curves:
        from shardwise.cluster.curves import measured_seconds

        seconds = measured_seconds(device, kernel.kind, kernel.dtype, kernel.shape, kernel.bytes)
        seconds = None if seconds is None else seconds * kernel.count
    if seconds is None:
        seconds = gpu.kernel_seconds(kernel, device)
    return seconds * slowdown(device, workers)


def slowdown(device: Device, workers: int) -> float:
    """How much slower each of `workers` computes that share the cores of a device; between measured numbers linear."""
    if not device.shared or workers <= 1:
        return 1.0
    known = sorted({1: 1.0, **device.shared}.items())
    for (below, less), (above, more) in pairwise(known):
        if workers <= above:
            return less + (more - less) * (workers - below) / (above - below)
    most, factor = known[-1]
    return factor * workers / most


def launches(kernels: Iterable[Kernel]) -> int:
    """How many kernels the host starts."""
    return sum(kernel.count for kernel in kernels)


def collective_seconds(collective: Collective, cluster: Cluster) -> float:
    """Seconds of a collective, from its ranks' start to their end; measured curves go first."""
    if cluster.collectives:
        from shardwise.cluster.curves import measured_collective_seconds

        seconds = measured_collective_seconds(cluster, collective)
        if seconds is not None:
            return seconds
    return network.collective_seconds(collective, cluster)
