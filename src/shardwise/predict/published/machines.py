"""The cluster that a row ran on: its devices in their nodes, over its network."""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster, Nodes
from shardwise.predict.published import devices, spelling
from shardwise.predict.published.columns import Row, text, whole


def cluster_of(row: Row, gpus: int) -> tuple[Cluster, list[str]]:
    """The row's devices in their nodes, and what the row does not say: that is as in the node they are sold in.

    Raises:
        Lacking: a device that the catalogue does not have.
    """
    device = devices.find(text(row, "gpu"))
    kind = catalogue.node(devices.sold_in(device))
    stated_node, network_text = whole(row, "gpus_per_node"), text(row, "interconnect")
    per_node = stated_node or kind.devices
    node = min(gpus, per_node)
    inner, network = kind.links[0], kind.links[-1]
    span = max(spelling.nvlink_domain(network_text) or node, node)
    if inner.span:
        span = max(span, inner.span)
    outer = catalogue.link(network.link, span=max(gpus, span))
    stated = spelling.node_bandwidth(network_text)
    if stated is None:
        per_device = outer.bandwidth * (network.ports or kind.devices) / kind.devices
    else:
        per_device = -stated if stated < 0 else stated / per_node
    levels = (replace(catalogue.link(inner.link, span=node), span=span), replace(outer, bandwidth=per_device))
    assumed = [] if stated_node else [f"nodes of {kind.devices}"]
    if stated is None and gpus > span:
        assumed.append(f"network of {kind.key}")
    return Cluster(name=network_text, nodes=(Nodes(device, node, -(-gpus // node)),), levels=levels), assumed
