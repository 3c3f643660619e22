"""Workers that measure together: which of them share a host and a switch, and how they wait for each other.

Some measurements run on a few workers while the others must not compute. The others wait in a gloo barrier in main
memory, which needs no core.
"""

from __future__ import annotations

import socket
from collections.abc import Sequence

import torch
import torch.distributed as dist

TEXT_BYTES = 128
"""Bytes of a host's or a switch's name that are compared, from its end."""


class Team:
    """All workers of the default process group, or this process alone. Creating it is collective.

    Attributes:
        rank: rank of this worker.
        size: number of workers.
        device: device on which this worker computes.
        host: index in `hosts` of this worker's host.
        hosts: ranks on each host, in the order of the hosts' first ranks.
        near: number of hosts at each switch; 0 if they are all at one, each at its own, or not equally many at each.
    """

    def __init__(self, device: torch.device, switch: str = "") -> None:
        """Meet the others.

        Args:
            device: see the attribute.
            switch: name of the switch of this worker's host; empty if it is not known.
        """
        together = dist.is_initialized()
        self.device = device
        self.rank = dist.get_rank() if together else 0
        self.size = dist.get_world_size() if together else 1
        self._everybody = dist.new_group(backend="gloo", group_desc="calibration") if together else None
        self._first: dict[int, dist.ProcessGroup | None] = {1: None, self.size: self._everybody}
        places = list(zip(self._texts(switch), self._texts(socket.gethostname()), strict=True))
        order = list(dict.fromkeys(places))
        self.hosts = [[rank for rank, place in enumerate(places) if place == host] for host in order]
        self.host = order.index(places[self.rank])
        self.near = near([name for name, _ in order])

    def first(self, count: int) -> dist.ProcessGroup | None:
        """Return the process group of the first `count` workers. Collective over all; returns None for a single one."""
        if count not in self._first:
            self._first[count] = dist.new_group(list(range(count)), backend="gloo")
        return self._first[count]

    def wait(self, count: int = 0) -> None:
        """Wait until the first `count` workers (0: all) have called this; collective over these."""
        group = self.first(count or self.size) if self.size > 1 else None
        if group is not None:
            dist.barrier(group)

    def most(self, values: Sequence[float]) -> list[float]:
        """Return the largest of all workers' values, one by one. Collective; all must pass equally many values."""
        return [max(column) for column in zip(*self.gathered(values), strict=True)]

    def gathered(self, values: Sequence[float], count: int = 0) -> list[list[float]]:
        """Return the values of the first `count` workers (0: all) by rank.

        Collective over these; all workers must pass equally many values.
        """
        group = self.first(count or self.size) if self.size > 1 else None
        if group is None:
            return [list(values)]
        mine = torch.tensor(values, dtype=torch.float64)
        parts = [torch.empty_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(parts, mine, group=group)
        return [part.tolist() for part in parts]

    def _texts(self, text: str) -> list[str]:
        """Return the texts of all workers by rank, each of at most TEXT_BYTES. Collective."""
        own = text.encode()[-TEXT_BYTES:].ljust(TEXT_BYTES)
        return [bytes(int(value) for value in row).decode(errors="replace").strip() for row in self.gathered(list(own))]


def near(switches: Sequence[str]) -> int:
    """Return the number of hosts at each switch, see `Team.near`.

    Args:
        switches: switch of each host; hosts of one switch are in a row.
    """
    counts = {switches.count(switch) for switch in switches}
    several = len(set(switches)) > 1 and "" not in switches
    return counts.pop() if several and len(counts) == 1 and 1 not in counts else 0
