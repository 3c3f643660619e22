"""Clusters whose GPUs never wait for their hosts, so that small models show what devices and links do."""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster


def quick(cluster: str | Cluster) -> Cluster:
    """Return a cluster, by its name or as it is, whose hosts launch kernels in no time; a CPU stays what it is."""
    found = find_cluster(cluster) if isinstance(cluster, str) else cluster
    if found.device(0).kind == "cpu":
        return found
    nodes = tuple(replace(each, device=replace(each.device, launch_seconds=1e-7)) for each in found.nodes)
    return replace(found, nodes=nodes)
