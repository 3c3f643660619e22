"""The cluster that a row ran on: its devices in their nodes, over its network."""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster, Nodes
from shardwise.predict.published import devices, spelling
from shardwise.predict.published.columns import Row, text, whole

SYSTEMS = {"hf cluster": ", EFA 3200 Gbps"}
"""Clusters that rows name without a word on their network, which other rows of the same source describe."""

LINK, NEWER_LINK = 25e9, 50e9
"""Bytes per second of one link of NVLink in one direction: generations 2 to 4, and 5 (NVIDIA's whitepapers)."""


def cluster_of(row: Row, gpus: int) -> tuple[Cluster, list[str]]:
    """The row's devices in their nodes, and what the row does not say: that is as in the node they are sold in.

    Raises:
        Lacking: a device that the catalogue does not have.
    """
    device = devices.find(text(row, "gpu"))
    kind = catalogue.node(devices.sold_in(device))
    stated_node, network_text = whole(row, "gpus_per_node"), text(row, "interconnect")
    network_text += SYSTEMS.get(network_text.lower(), "")
    per_node = stated_node or kind.devices
    node = min(gpus, per_node)
    inner, network = kind.links[0], kind.links[-1]
    span = max(spelling.nvlink_domain(network_text) or node, node)
    if inner.span:
        span = max(span, inner.span)
    stated, named = spelling.node_bandwidth(network_text), spelling.network(network_text)
    sold = catalogue.link(network.link, span=max(gpus, span))
    outer = catalogue.link(named, span=max(gpus, span)) if named and stated else sold
    if stated is None:
        per_device = sold.bandwidth * (network.ports or kind.devices) / kind.devices
    else:
        per_device = -stated if stated < 0 else stated / per_node
    within = catalogue.link(inner.link, span=span)
    links = spelling.nvlink_links(network_text)
    if links and "nvlink" in inner.link:
        each = NEWER_LINK if "nvlink5" in inner.link else LINK
        within = replace(within, bandwidth=min(within.bandwidth, links * each))
    levels = (within, replace(outer, bandwidth=per_device))
    assumed = [] if stated_node else [f"nodes of {kind.devices}"]
    if stated is None and gpus > span:
        assumed.append(f"network of {kind.key}")
    return Cluster(name=network_text, nodes=(Nodes(device, node, -(-gpus // node)),), levels=levels), assumed
