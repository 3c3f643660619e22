"""Seconds of kernels and collectives on a cluster: interpolated from measurements if there are any, else modelled.

    device with curves           `cluster.curves`, for the number of workers per host and threads per worker of the job
    device without curves        `predict.hardware.gpu`, from datasheets
    cluster with collectives     their curves, for the group size and the number of concurrent groups of the job
    cluster without, and         `predict.hardware.network`, from the latency and bandwidth of the levels
    operations not measured
    group of CPUs over hosts     the sum of its steps, see `host_layers`, if its size was not measured

Workers that share the cores of a CPU slow each other down; calibration measures by how much.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device
from shardwise.cluster.curves import Curves, Line, situations
from shardwise.collective import Collective
from shardwise.errors import RequestError
from shardwise.host_layers import layer_steps
from shardwise.predict.hardware import gpu, network
from shardwise.predict.hardware.constants import constants
from shardwise.predict.profile.kernel import Kernel


class KernelTimes:
    """Seconds of kernels on one device, with a cache of kernels that were already looked up.

    Args:
        device: the device that runs the kernels.
        workers: average number of workers that share the device. A GPU is never shared: there it counts as 1.

    Raises:
        RequestError: the device has curves, but none for workers with this number of threads.
    """

    def __init__(self, device: Device, workers: float = 1) -> None:
        self.device, self.workers = device, workers if device.kind == "cpu" else 1
        self._known: dict[Kernel, float] = {}
        self._measured = _measured(device, self.workers) if device.curves else []

    def seconds(self, kernel: Kernel) -> float:
        """Return the seconds for which all `kernel.count` executions keep the device busy.

        Raises:
            RequestError: the device has neither a rate nor a measurement for the kernel's dtype.
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
    """Return (weight, curves) pairs; the weighted sum of their times is the time with `workers` workers per host.

    Between two measured numbers of workers with the same number of threads, times are interpolated linearly. Beyond
    the largest measured number its curves are used, times the ratio of the slowdowns (see `slowdown`). Where no
    slowdown was measured, the factor is how far the threads exceed the cores and the threads that were measured.
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
    """Return the factor by which each of `workers` workers on the same cores is slower than one worker alone.

    It is interpolated linearly between measured numbers of workers, and grows in proportion beyond the largest one.
    Returns 1 if no slowdown was measured.
    """
    if not device.shared or workers <= 1:
        return 1.0
    known = sorted({1: 1.0, **device.shared}.items())
    for (below, less), (above, more) in pairwise(known):
        if workers <= above:
            return less + (more - less) * (workers - below) / (above - below)
    most, factor = known[-1]
    return factor * workers / most


def overlap_of(device: Device) -> float:
    """Return the factor by which a device computes more slowly while it communicates; 1 means none.

    It is the device's own if it was measured, else on a GPU the one that published runs show.
    """
    if device.kind != "gpu" or device.origins.get("overlap") == "measured" or device.overlap > 1.0:
        return device.overlap
    return 1.0 / (1.0 - constants().overlap_loss)


def slowed(hidden: float, overlap: float) -> float:
    """Return the seconds by which compute takes longer because `hidden` seconds of communication overlap with it.

    During the overlap a worker computes at 1 / `overlap` of its speed (`cluster.Device.overlap`).
    """
    return hidden * (1.0 - 1.0 / overlap) if overlap > 1.0 else 0.0


def delay(seconds: float, beside: float, overlap: float) -> float:
    """Return the seconds by which a collective delays a worker that computes for `beside` seconds before it waits.

    Both begin together. What is computed meanwhile takes `overlap` times as long (`cluster.Device.overlap`).
    """
    return max(seconds - beside, slowed(seconds, overlap)) if beside else seconds


def launches(kernels: Iterable[Kernel]) -> int:
    """Count the kernels that the host launches: the sum of their `count`."""
    return sum(kernel.count for kernel in kernels)


def collective_seconds(collective: Collective, cluster: Cluster, workers: int = 0) -> float:
    """Return the seconds of a collective whose ranks all start together, until the last one is done.

    If no group of this size was measured, the time of the nearest measured size is scaled by the ratio of the modelled
    times.

    Args:
        collective: the operation, bytes and group.
        cluster: the cluster that runs it.
        workers: workers of the whole job, which form `workers // group.size` groups that run the same collective at
            the same time; 0 selects the fewest groups that were measured.

    Raises:
        RequestError: the cluster has no level that spans the group.
    """
    group = collective.group
    if group.size <= 1:
        return 0.0
    nodes = group.domains(cluster.node_size)
    known = _joined(collective, nodes, cluster)
    if nodes > 1 and _in_layers(cluster) and all(curve.ranks != group.size for curve in known):
        steps = layer_steps(collective, cluster.node_size)
        if steps:
            return sum(collective_seconds(step, cluster, workers) for step in steps)
    if not known:
        return network.collective_seconds(collective, cluster)
    ranks = min({curve.ranks for curve in known}, key=lambda count: (abs(count - group.size), -count))
    seconds = _at_once([curve for curve in known if curve.ranks == ranks], collective.bytes, workers // group.size)
    if ranks == group.size:
        return seconds
    nearest = replace(collective, group=replace(group, size=ranks))
    return seconds * _modelled(collective, cluster) / _modelled(nearest, cluster)


def _joined(collective: Collective, nodes: int, cluster: Cluster) -> list[CollectiveCurve]:
    """Return the curves of an operation among as many nodes, joined by the same level of links."""
    alike = (collective.operation, nodes)
    known = [curve for curve in cluster.collectives if (curve.operation, curve.nodes) == alike and curve.samples]
    if not any(curve.level for curve in known):
        return known
    level = network.level_of(collective.group, cluster).name
    return [curve for curve in known if curve.level in ("", level)]


def _in_layers(cluster: Cluster) -> bool:
    """Return whether workers of a cluster run collectives over hosts in layers: those on CPUs, unless by gloo alone."""
    return cluster.nodes[0].device.kind == "cpu" and cluster.software.get("backend") != "gloo"


def _modelled(collective: Collective, cluster: Cluster) -> float:
    return network.collective_seconds(collective, cluster)


def _at_once(curves: Sequence[CollectiveCurve], size: int, groups: int) -> float:
    """Return the seconds of a collective of `size` bytes while `groups` groups run it at the same time.

    It is interpolated linearly between measured numbers of groups. Outside of their range the nearest one is used.
    """
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
    """Return the origin of each number behind the times: attribute of the device, kernels or collectives -> origin."""
    found: dict[str, str] = dict(device.origins)
    if device.curves:
        found["kernels"] = "measured"
    if cluster.collectives:
        found["collectives"] = "measured"
    return found
