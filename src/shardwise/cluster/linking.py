"""Curves of collectives, measured: each operation by bytes, for groups within a host and across hosts.

All groups of a layout communicate at the same time, as they do in training. Calls follow each other without a pause,
so that no worker runs ahead of the others: a message goes to and fro, a broadcast comes from each worker in turn.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.cluster.cluster import CollectiveCurve, Sample
from shardwise.cluster.team import Team
from shardwise.cluster.timer import rounded, spread

SIZES = (1024, 16 * 1024, 128 * 1024, 1024**2, 8 * 1024**2)
"""Bytes of messages, counted as in `collective.Collective`."""

LEAST, MOST = 4, 60
"""Calls of each size."""

SLOW = 0.1
"""Seconds of a call above which two of them are enough, the first one included: what warming up takes does not show."""


@dataclass(frozen=True, slots=True)
class Layout:
    """Groups that communicate at the same time.

    Attributes:
        groups: ranks of each; all of the same size.
        nodes: hosts that each is spread over.
    """

    groups: tuple[tuple[int, ...], ...]
    nodes: int

    @property
    def ranks(self) -> int:
        """Of one group."""
        return len(self.groups[0])

    @property
    def workers(self) -> list[int]:
        """Those that take part."""
        return sorted(rank for group in self.groups for rank in group)


def layouts(hosts: Sequence[Sequence[int]]) -> Iterator[Layout]:
    """Groups of the first host's workers, alone and beside each other; groups over hosts where there are several."""
    first = tuple(hosts[0])
    size = 2
    while size <= len(first):
        count = 1
        while count * size <= len(first):
            yield Layout(tuple(first[i * size : (i + 1) * size] for i in range(count)), 1)
            count *= 2
        size *= 2
    if len(hosts) > 1:
        least = min(len(host) for host in hosts)
        across = tuple(tuple(host[place] for host in hosts) for place in range(least))
        yield Layout(across[:1], len(hosts))
        if least > 1:
            yield Layout(across, len(hosts))
            yield Layout((tuple(sorted(rank for host in hosts for rank in host[:least])),), len(hosts))


def collective_curves(
    team: Team, layout: Layout, seconds: float, advance: Callable[[int], None]
) -> list[CollectiveCurve]:
    """Every operation by bytes; collective over all workers.

    Args:
        team: all workers.
        layout: which of them communicate.
        seconds: to spend on each size of each operation.
        advance: is told how many sizes have been done.
    """
    made = [(ranks, dist.new_group(list(ranks))) for ranks in layout.groups]
    mine = next((group for ranks, group in made if team.rank in ranks), None)
    curves = []
    for operation, call in OPERATIONS.items():
        samples = []
        for size in SIZES:
            team.wait()
            found = [0.0]
            if mine is not None:
                found = _timed(call, size, mine, team.device, seconds)
            by_rank = team.gathered([_undisturbed(found), spread(found)])
            slowest = max(by_rank[rank][0] for rank in layout.workers)
            samples.append(Sample((size,), rounded(slowest), round(max(row[1] for row in by_rank), 3)))
            advance(1)
        curves.append(CollectiveCurve(operation, layout.ranks, layout.nodes, tuple(samples), len(layout.groups)))
    for _, group in made:
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return curves


Call = Callable[[int, dist.ProcessGroup, torch.device], Callable[[], int]]
"""(bytes, group, device) -> a call that returns how many operations it did one after the other."""


def _timed(call: Call, size: int, group: dist.ProcessGroup, device: torch.device, seconds: float) -> list[float]:
    once = call(size, group, device)

    def clocked() -> tuple[float, int]:
        start = _now(device)
        count = once()
        return _now(device) - start, count

    def slowest(took: float) -> float:
        agreed = torch.tensor([took], device=device)
        dist.all_reduce(agreed, dist.ReduceOp.MAX, group=group)
        return float(agreed)

    first = clocked()
    if slowest(first[0]) > SLOW:
        return [took / count for took, count in (first, clocked())]
    once()
    took = slowest(min(clocked()[0] for _ in range(3)))  # a slow one would leave too few to tell
    calls = (clocked() for _ in range(min(MOST, max(LEAST, int(seconds / max(took, 1e-6))))))
    return [took / count for took, count in calls]


def _undisturbed(found: Sequence[float]) -> float:
    """The lower quartile; of a few the least.

    Where workers share cores a message takes one of two times: as long as it travels, or until the receiver has a core
    again, and how often it does is up to chance. Waiting is measured where it happens, in whole steps
    (`cluster.Device.overheads`).
    """
    return statistics.quantiles(found, n=4)[0] if len(found) >= LEAST else min(found)


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _elements(size: int, device: torch.device) -> Tensor:
    return torch.ones(max(1, size // 4), device=device)


def _all_reduce(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    tensor = torch.zeros(max(1, size // 4), device=device)

    def once() -> int:
        dist.all_reduce(tensor, group=group)
        return 1

    return once


def _all_gather(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    ranks = dist.get_world_size(group)
    part = _elements(size // ranks, device)
    parts = [torch.empty_like(part) for _ in range(ranks)]

    def once() -> int:
        dist.all_gather(parts, part, group=group)
        return 1

    return once


def _reduce_scatter(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    ranks = dist.get_world_size(group)
    parts = [_elements(size // ranks, device) for _ in range(ranks)]
    output = torch.empty_like(parts[0])

    def once() -> int:
        dist.reduce_scatter(output, parts, group=group)
        return 1

    return once


def _all_to_all(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    ranks = dist.get_world_size(group)
    tensor = torch.ones(ranks * max(1, size // 4 // ranks), device=device)
    output = torch.empty_like(tensor)

    def once() -> int:
        dist.all_to_all_single(output, tensor, group=group)
        return 1

    return once


def _broadcast(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    tensor = _elements(size, device)
    ranks = dist.get_process_group_ranks(group)

    def once() -> int:
        for source in ranks:  # each waits for the one before
            dist.broadcast(tensor, source, group=group)
        return len(ranks)

    return once


def _send(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    tensor = _elements(size, device)
    ranks = dist.get_process_group_ranks(group)
    place = ranks.index(dist.get_rank())
    other = ranks[place ^ 1] if place ^ 1 < len(ranks) else None

    def once() -> int:
        if other is None:
            return 1
        steps = (dist.send, dist.recv) if place % 2 == 0 else (dist.recv, dist.send)
        for step in steps:
            step(tensor, other, group=group)
        return 2

    return once


OPERATIONS: dict[str, Call] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send": _send,
}
"""Operation, as in `collective.Collective` -> what to call."""
