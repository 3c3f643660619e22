"""Analytic model of collective times: rings and trees over the levels of a cluster, from latency and bandwidth.

For n ranks, k of them in each node, and S bytes (as `collective.Collective` counts them):

    all_gather, reduce_scatter   every byte crosses each link (n-1)/n times in n-1 steps (Patarasuk and Yuan 2009), and
                                 each rank also reads, adds and writes its message (`Constants.link_copy`)
    all_reduce                   reduce_scatter, then all_gather; or up and down a tree of the nodes, in fewer steps
    all_to_all                   bytes that stay in a node go over its links, all others over the network
    broadcast, reduce            the message crosses each link once
    send, recv                   the message crosses one link

A ring enters and leaves each node once, over the network ports of all k of its ranks together. Sibling groups, whose
ranks lie in the same nodes, run the same collective at the same time over the ports of their own ranks.
"""

from __future__ import annotations

from math import ceil, log2

from shardwise.cluster.cluster import Cluster, Level
from shardwise.collective import Collective, Group
from shardwise.errors import RequestError
from shardwise.predict.hardware.constants import Constants, constants

HOSTED = ("omni-path", "efa", "tcpxo", "ethernet")
"""Prefixes of the names of networks whose transport runs on the host's processors."""

RING_PASSES = {"all_gather": 1, "reduce_scatter": 1, "all_reduce": 2}


def collective_seconds(collective: Collective, cluster: Cluster, numbers: Constants | None = None) -> float:
    """Return the seconds of a collective whose ranks all start together, until the last one is done.

    Args:
        collective: the operation, bytes and group.
        cluster: the cluster, of which only the levels are read. `times.collective_seconds` prefers measured curves.
        numbers: constants of the model; None selects the fitted ones.

    Raises:
        RequestError: the cluster has no level that spans the group.
    """
    numbers = numbers or constants()
    group = collective.group
    if group.size <= 1 or not cluster.levels:
        return 0.0
    inner, outer = cluster.levels[0], level_of(group, cluster)
    local = group.within(inner.span)
    if collective.operation in ("send", "recv"):
        return _message_seconds(collective.bytes, outer, outer is inner, numbers)
    if local == group.size or outer is inner:
        return _within(collective.operation, collective.bytes, group.size, inner, numbers)
    return _across(collective.operation, collective.bytes, group.size, local, inner, outer, numbers)


def level_of(group: Group, cluster: Cluster) -> Level:
    """Return the innermost level of which one domain contains the whole group.

    Raises:
        RequestError: no level spans the group.
    """
    last = group.ranks[-1]
    for level in cluster.levels:
        if group.first // level.span == last // level.span:
            return level
    raise RequestError(
        f"ranks {group.first} to {last} lie in no common level of {cluster.name}; its outermost level spans "
        f"{cluster.levels[-1].span} devices"
    )


def _message_seconds(amount: float, level: Level, inside: bool, numbers: Constants) -> float:
    share = numbers.link_share if inside else network_share(level, numbers)
    hop = numbers.link_hop if inside else numbers.network_hop
    copied = numbers.link_copy if inside else 0.0
    return hop + level.latency + (1 + copied) * amount / (level.bandwidth * share)


def network_share(level: Level, numbers: Constants) -> float:
    """Return the share of a network's datasheet bandwidth that a collective reaches."""
    return numbers.hosted_share if level.name.startswith(HOSTED) else numbers.network_share


def _within(operation: str, amount: float, ranks: int, level: Level, numbers: Constants) -> float:
    """Return the seconds of a collective among `ranks` ranks in one domain of a level."""
    bandwidth = level.bandwidth * numbers.link_share
    hop = numbers.link_hop + level.latency
    share, copied = (ranks - 1) / ranks, numbers.link_copy
    passes = RING_PASSES.get(operation)
    if passes:
        return numbers.collective_start + passes * ((ranks - 1) * hop + (share + copied) * amount / bandwidth)
    if operation == "all_to_all":  # copied before sending and after receiving
        return numbers.collective_start + hop * log2(ranks) + (share + 2 * copied) * amount / bandwidth
    if operation == "barrier":
        return numbers.collective_start + 2 * hop * ceil(log2(ranks))
    return numbers.collective_start + (ranks - 1) * hop + (1 + copied) * amount / bandwidth


def _across(
    operation: str, amount: float, ranks: int, local: int, inner: Level, outer: Level, numbers: Constants
) -> float:
    """Return the seconds of a collective among `ranks` ranks that lie in several nodes, `local` of them in each."""
    nodes = ceil(ranks / local)
    ports = outer.bandwidth * network_share(outer, numbers) * local
    links = inner.bandwidth * numbers.link_share
    hop_inner, hop_outer = numbers.link_hop + inner.latency, numbers.network_hop + outer.latency
    share = (ranks - 1) / ranks
    passes = RING_PASSES.get(operation)
    if passes:
        moved = share * amount / ports
        if local > 1:
            moved = max(moved, (share + numbers.link_copy) * amount / links)
        ring = nodes * hop_outer + nodes * (local - 1) * hop_inner
        tree = ceil(log2(nodes)) * hop_outer + (local - 1) * hop_inner
        steps = min(ring, tree) if operation == "all_reduce" else ring
        return numbers.collective_start + passes * (steps + moved)
    if operation == "all_to_all":
        remote = amount * (ranks - local) / ranks / (outer.bandwidth * network_share(outer, numbers))
        near = amount * (local - 1) / ranks / links
        return numbers.collective_start + hop_outer * log2(ranks) + max(remote, near)
    if operation == "barrier":
        return numbers.collective_start + 2 * (ceil(log2(nodes)) * hop_outer + ceil(log2(local)) * hop_inner)
    return numbers.collective_start + nodes * hop_outer + (local - 1) * hop_inner + amount / min(ports, links)
