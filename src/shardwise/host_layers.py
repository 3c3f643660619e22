"""Collectives over several hosts in layers: first within each host, then between the hosts, then within again.

Of a group of H hosts with L workers each, only workers of the same number l within their hosts talk to another host,
each about its part. With S bytes (as `collective.Collective` counts them) each worker runs:

                    within its host       between the hosts      within its host       bytes that leave a host
    all_reduce      reduce_scatter S      all_reduce S / L       all_gather S          2 S (H-1)/H
    reduce_scatter  reduce_scatter S      reduce_scatter S / L                         S (H-1)/H
    all_gather                            all_gather S / L       all_gather S          S (H-1)/H

A ring through all H L workers sends 2 S (HL-1)/HL bytes of an all-reduce out of each host: for two hosts nearly twice
as many. The program (`launch.shared_memory.layered_group`) and the prediction (`predict.hardware`) read this module.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace

from shardwise.collective import Collective, Group

LEAST_BYTES = 64 * 2**10
"""Bytes of a collective from which it runs in layers: the bytes saved cost more then than the further messages."""


def layer_steps(collective: Collective, node_size: int) -> tuple[Collective, ...]:
    """Return the collectives that the first worker runs as steps of one over hosts of `node_size` ranks each.

    Returns none if it does not run in layers.
    """
    group = collective.group
    grid = host_grid([rank // node_size for rank in group.ranks])
    if len(grid) < 2 or collective.bytes < LEAST_BYTES:
        return ()
    local = len(grid[0])
    inside = replace(collective, group=_members(group, grid[0]))
    scatter, gather = replace(inside, operation="reduce_scatter"), replace(inside, operation="all_gather")
    bytes_ = -(-collective.bytes // local)
    between = replace(collective, bytes=bytes_, group=_members(group, [row[0] for row in grid]))
    return {
        "all_reduce": (scatter, between, gather),
        "reduce_scatter": (scatter, between),
        "all_gather": (between, gather),
    }.get(collective.operation, ())


def _members(group: Group, numbers: Sequence[int]) -> Group:
    return Group.of([group.ranks[number] for number in numbers])


def host_grid(hosts: Sequence[Hashable]) -> tuple[tuple[int, ...], ...]:
    """Return the workers of a group by host, in the order in which hosts appear.

    Args:
        hosts: host of each worker.

    Returns:
        A row of workers for each host. Empty if workers on several hosts have no layers: with one worker on each host,
        or not equally many.
    """
    rows: dict[Hashable, list[int]] = {}
    for worker, host in enumerate(hosts):
        rows.setdefault(host, []).append(worker)
    sizes = {len(row) for row in rows.values()}
    layered = len(rows) == 1 or (len(sizes) == 1 and sizes != {1})
    return tuple(map(tuple, rows.values())) if layered else ()
