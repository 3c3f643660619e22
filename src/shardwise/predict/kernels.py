"""Seconds of kernels and collectives on a cluster: between the points that were measured there, else by the models.

    a device with curves           cluster.curves, for as many workers with as many threads as there will be
    a device without               predict.gpu, from datasheets
    a cluster with collectives     their curves, for groups of as many ranks at the same time as there will be
    without, and for operations    predict.network, from the levels' latency and bandwidth
    that were not measured

Workers that share the cores of a CPU slow each other down; how much is measured.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device
from shardwise.cluster.curves import Curves, Line, situations
from shardwise.collective import Collective
from shardwise.errors import RequestError
from shardwise.predict import gpu, network
from shardwise.predict.kernel import Kernel


class KernelTimes:
    """Seconds of kernels on one device; each different kernel is looked up once.

    Args:
        device: where.
        workers: that share it, on average.

    Raises:
        RequestError: the device has curves, but none for workers with as many threads.
    """

    def __init__(self, device: Device, workers: float = 1) -> None:
        self.device, self.workers = device, workers if device.kind == "cpu" else 1
        self._known: dict[Kernel, float] = {}
        self._measured = _measured(device, self.workers) if device.curves else []

    def seconds(self, kernel: Kernel) -> float:
        """Seconds that the device is busy with `kernel`, all `kernel.count` of them.

        Raises:
            RequestError: nothing is known of the kernel's dtype on this device.
        """
        if kernel not in self._known:
            self._known[kernel] = self._seconds(kernel)
        return self._known[kernel]

    def _seconds(self, kernel: Kernel) -> float:
        if not self._measured:
            return gpu.kernel_seconds(kernel, self.device) * slowdown(self.device, self.workers)
        measured = sum(share * self._looked_up(kernel, curves) for share, curves in self._measured)
        return kernel.count * measured * self.device.strain

    def _looked_up(self, kernel: Kernel, curves: Curves) -> float:
        if kernel.kind == "memory":
            found = curves.moved(kernel.operation, kernel.dtype, kernel.bytes)
        else:
            found = curves.computed(kernel.kind, kernel.operation, kernel.dtype, kernel.backward, kernel.shape)
        if found is None:
            raise RequestError(
                f"{self.device.name} was not measured with {kernel.operation} in {kernel.dtype}, only with "
                f"{', '.join(curves.measured)}: use one of these"
            )
        return found


def _measured(device: Device, workers: float) -> list[tuple[float, Curves]]:
    """(weight, curves) whose sum is what so many workers need.

    Between two measured numbers of workers with as many threads a straight line; beyond the largest one its curves,
    times how much more such workers slow each other down.
    """
    threads = device.threads or max(1, int(device.cores // workers))
    known = [count for count, each in situations(device.curves) if each == threads]
    if device.kind != "cpu":
        known, threads = [1], 1
    if not known:
        measured = ", ".join(f"{count} with {each}" for count, each in situations(device.curves))
        raise RequestError(
            f"{device.name} was not measured with {workers} workers of {threads} threads each, only {measured}: "
            f"use shardwise calibrate --workers {workers}"
        )
    below = max((count for count in known if count <= workers), default=known[0])
    above = min((count for count in known if count >= workers), default=0)
    if not above:
        factor = slowdown(device, workers) / slowdown(device, below)
        if not device.shared:
            factor = max(1.0, workers * threads / max(device.cores, below * threads))
        return [(factor, Curves(device.curves, below, threads))]
    if above == below:
        return [(1.0, Curves(device.curves, below, threads))]
    part = (workers - below) / (above - below)
    return [(1 - part, Curves(device.curves, below, threads)), (part, Curves(device.curves, above, threads))]


def slowdown(device: Device, workers: float) -> float:
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


def collective_seconds(collective: Collective, cluster: Cluster, workers: int = 0) -> float:
    """Seconds of a collective, from its ranks' start to their end.

    Args:
        collective: what is issued.
        cluster: on which.
        workers: of the whole job; 0: those of the collective's group. Its other groups do the same at the same time.

    Raises:
        RequestError: the cluster has no level that spans the group.
    """
    group = collective.group
    if group.size <= 1:
        return 0.0
    if not cluster.collectives:
        return network.collective_seconds(collective, cluster)
    nodes = _nodes_of(collective, cluster)
    known = [c for c in cluster.collectives if c.operation == collective.operation and c.nodes == nodes and c.samples]
    if not known:
        return network.collective_seconds(collective, cluster)
    ranks = min({curve.ranks for curve in known}, key=lambda count: (abs(count - group.size), -count))
    seconds = _at_once([curve for curve in known if curve.ranks == ranks], collective.bytes, workers // group.size)
    if ranks == group.size:
        return seconds
    measured = replace(collective, group=replace(group, size=ranks))
    return seconds * _modelled(collective, cluster) / _modelled(measured, cluster)


def _modelled(collective: Collective, cluster: Cluster) -> float:
    return network.collective_seconds(collective, cluster)


def _nodes_of(collective: Collective, cluster: Cluster) -> int:
    """Over how many nodes the ranks are spread."""
    return len({rank // cluster.node_size for rank in collective.group.ranks})


def _at_once(curves: Sequence[CollectiveCurve], size: int, groups: int) -> float:
    """Seconds of groups that communicate at the same time: between measured numbers linear, beyond as the nearest."""
    lines = {curve.groups: Line(curve.samples)(size) for curve in curves}
    known = sorted(lines)
    groups = max(groups, known[0])
    if groups == known[0]:
        return lines[groups]
    for below, above in pairwise(known):
        if groups <= above:
            return lines[below] + (lines[above] - lines[below]) * (groups - below) / (above - below)
    return lines[known[-1]]


def origins(cluster: Cluster, device: Device) -> Mapping[str, str]:
    """What seconds on a cluster rest on: attribute of the device, its links or collectives -> origin."""
    found: dict[str, str] = dict(device.origins)
    if device.curves:
        found["kernels"] = "measured"
    if cluster.collectives:
        found["collectives"] = "measured"
    return found
