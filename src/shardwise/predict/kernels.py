"""Seconds of kernels and collectives on a cluster, by the analytic models.

Workers that share the cores of a CPU slow each other down; how much is measured (`Device.shared`).
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective
from shardwise.errors import RequestError
from shardwise.predict import gpu, network
from shardwise.predict.kernel import Kernel


def kernel_seconds(kernel: Kernel, device: Device, workers: int = 1) -> float:
    """Seconds that a device is busy with `kernel`, all `kernel.count` of them.

    Args:
        kernel: what to compute.
        device: where.
        workers: that share the cores of the device.

    Raises:
        RequestError: nothing is known of the kernel's dtype on this device.
    """
    if device.curves:
        raise RequestError(f"{device.name} has measured curves, which this version does not use: leave out `curves`")
    return gpu.kernel_seconds(kernel, device) * slowdown(device, workers)


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
    """Seconds of a collective, from its ranks' start to their end."""
    if cluster.collectives:
        raise RequestError(
            f"{cluster.name} has measured collectives, which this version does not use: leave out `collectives`"
        )
    return network.collective_seconds(collective, cluster)
