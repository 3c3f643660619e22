"""Judge a measurement of this machine: refuse impossible numbers, and tell when other programs disturbed it."""

from __future__ import annotations

import sys
from collections.abc import Mapping

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.measure.interference import busiest, described, is_busy
from shardwise.errors import NotMeasured
from shardwise.units import format_share

MOST_STRAIN = 2.0
"""Ratio of the time of kernels in a training to that alone, from which it cannot be the state of the caches."""

LEAST_SLOWDOWN = 0.9
"""Slowdown of workers that share cores below which it is not by chance: none computes faster than one alone."""


def trusted(cluster: Cluster) -> Cluster:
    """Return a cluster that was just measured, and print a line if other programs disturbed the measurement.

    Raises:
        NotMeasured: its numbers are impossible.
    """
    wrong = impossible(cluster)
    most = busiest() if wrong or is_busy(cluster.busy) else ""
    if wrong:
        raise NotMeasured(
            f"the measurement of this machine says that {wrong}, which is impossible ({_busy(cluster, most)}): "
            f"run shardwise calibrate when it is idle"
        )
    if is_busy(cluster.busy):
        sys.stderr.write(f"{disturbed(cluster, most)}\n")
    return cluster


def impossible(cluster: Cluster) -> str:
    """Return the statement of a measurement that cannot be true; empty if there is none.

    Kernels at other speeds in a training than alone, and steps without host time, may be errors of the model. They
    count only where other programs disturbed the measurement.
    """
    device = cluster.nodes[0].device
    if device.launch_seconds <= 0:
        return "a kernel needs no host time"
    if faster_together(device.shared):
        return "workers that share cores compute faster than one alone"
    if is_busy(cluster.busy) and not 1 / MOST_STRAIN < device.strain < MOST_STRAIN:
        return f"kernels take {device.strain:.2f} times as long in a training as alone"
    if is_busy(cluster.busy) and device.overheads.get("step") == 0:
        return "a step needs no host time"
    return ""


def faster_together(shared: Mapping[int, float]) -> bool:
    """Return whether slowdowns of workers that share cores are below 1 by more than chance."""
    return min(shared.values(), default=1.0) < LEAST_SLOWDOWN


def disturbed(cluster: Cluster, most: str = "") -> str:
    """Return a line about a disturbed measurement: by whom, and how uncertain its numbers are.

    Args:
        cluster: the measured cluster.
        most: the program that disturbed most, if it is known.
    """
    scatter = max(cluster.nodes[0].device.spreads.values(), default=0.0)
    return (
        f"the measurement of this machine is uncertain ({_busy(cluster, most)}; equal steps differed by "
        f"{format_share(scatter)}), and so are predictions: it is made again in a later run on an idle machine"
    )


def _busy(cluster: Cluster, most: str) -> str:
    return described(cluster.busy, most, "used")
