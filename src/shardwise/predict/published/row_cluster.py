"""Cluster that a row's run used: its devices in their nodes, and its network."""

from __future__ import annotations

from dataclasses import replace

from shardwise.cluster import catalogue
from shardwise.cluster.cluster import Cluster, Nodes
from shardwise.predict.published import cells, device_names
from shardwise.predict.published.columns import Row, text, whole

SYSTEMS = {"hf cluster": ", EFA 3200 Gbps"}
"""Named clusters -> their network, which other rows of the same source describe."""

LINK, NEWER_LINK = 25e9, 50e9
"""Bytes per second of one NVLink link in one direction: of generations 2 to 4, and of 5 (NVIDIA's whitepapers)."""


def cluster_of(row: Row, gpus: int) -> tuple[Cluster, list[str]]:
    """Build a row's cluster of `gpus` devices, and list what the row does not say.

    Unstated figures are those of the node that the device is sold in.

    Raises:
        MissingColumn: the catalogue does not have the device.
    """
    device = device_names.find(text(row, "gpu"))
    kind = catalogue.node(device_names.sold_in(device))
    stated_node, network_text = whole(row, "gpus_per_node"), text(row, "interconnect")
    network_text += SYSTEMS.get(network_text.lower(), "")
    per_node = stated_node or kind.devices
    node = min(gpus, per_node)
    inner, network = kind.links[0], kind.links[-1]
    span = max(cells.nvlink_domain(network_text) or node, node)
    if inner.span:
        span = max(span, inner.span)
    stated, named = cells.node_bandwidth(network_text), cells.network(network_text)
    sold = catalogue.link(network.link, span=max(gpus, span))
    outer = catalogue.link(named, span=max(gpus, span)) if named and stated else sold
    if stated is None:
        per_device = sold.bandwidth * (network.ports or kind.devices) / kind.devices
    else:
        per_device = -stated if stated < 0 else stated / per_node
    within = catalogue.link(inner.link, span=span)
    links = cells.nvlink_links(network_text)
    if links and "nvlink" in inner.link:
        each = NEWER_LINK if "nvlink5" in inner.link else LINK
        within = replace(within, bandwidth=min(within.bandwidth, links * each))
    levels = (within, replace(outer, bandwidth=per_device))
    assumed = [] if stated_node else [f"nodes of {kind.devices}"]
    if stated is None and gpus > span:
        assumed.append(f"network of {kind.key}")
    return Cluster(name=network_text, nodes=(Nodes(device, node, -(-gpus // node)),), levels=levels), assumed
