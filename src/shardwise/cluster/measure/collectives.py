"""Measure curves of collectives: each operation by bytes, for groups within a host and across hosts.

All groups of a layout communicate at the same time, as they do in training. Calls follow each other without a pause.
So that no worker runs ahead of the others, a message is sent back and forth, and each worker in turn broadcasts.
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
from shardwise.cluster.measure.team import Team
from shardwise.cluster.measure.timer import rounded, spread

SIZES = (1024, 16 * 1024, 128 * 1024, 1024**2, 8 * 1024**2)
GPU_SIZES = (1024, 64 * 1024, 1024**2, 8 * 1024**2, 64 * 1024**2, 512 * 1024**2)
"""Bytes of the messages that are measured on a CPU and on a GPU, counted as in `collective.Collective`.

The links of GPUs are so fast that they are not filled by less, and the gradients of a layer are as large.
"""

WITHIN_HOST, BETWEEN_HOSTS = "within a host", "between hosts"
WITHIN_SWITCH, BETWEEN_SWITCHES = "within a switch", "between switches"
"""Names of the levels of links of a measured cluster; the last two take the place of the second where hosts are at
several switches."""

LEAST, MOST, TURNS = 4, 60, 4
"""Fewest and most calls of each size in a turn, and turns in which all sizes are measured."""

SLOW = 0.1
"""Seconds of a call above which two calls in one turn are enough: the first one, because a warm-up is negligible."""


@dataclass(frozen=True, slots=True)
class GroupLayout:
    """Process groups that communicate at the same time.

    Attributes:
        groups: ranks of each group; all groups have the same size.
        nodes: number of hosts over which each group is spread.
        level: name of the level of links that each group is spread over, where others spread over as many hosts.
    """

    groups: tuple[tuple[int, ...], ...]
    nodes: int
    level: str = ""

    @property
    def ranks(self) -> int:
        """Number of ranks in one group."""
        return len(self.groups[0])

    @property
    def workers(self) -> list[int]:
        """Sorted ranks of all groups."""
        return sorted(rank for group in self.groups for rank in group)


def layouts(hosts: Sequence[Sequence[int]], near: int = 0) -> Iterator[GroupLayout]:
    """Yield layouts: groups of the first host's workers, alone and side by side, then groups across hosts if any.

    Args:
        hosts: ranks on each host.
        near: number of hosts at each switch; 0 if switches do not matter. Groups across the hosts of the first switch
            come before those across all hosts.
    """
    first = tuple(hosts[0])
    size = 2
    while size <= len(first):
        count = 1
        while count * size <= len(first):
            yield GroupLayout(tuple(first[i * size : (i + 1) * size] for i in range(count)), 1)
            count *= 2
        size *= 2
    if near:
        yield from _across(hosts[:near], WITHIN_SWITCH)
    if len(hosts) > 1:
        yield from _across(hosts, BETWEEN_SWITCHES if near else "")


def _across(hosts: Sequence[Sequence[int]], level: str) -> Iterator[GroupLayout]:
    """Yield layouts of groups across hosts: with one worker of each, alone and side by side, and with all of each."""
    least = min(len(host) for host in hosts)
    across = tuple(tuple(host[index] for host in hosts) for index in range(least))
    yield GroupLayout(across[:1], len(hosts), level)
    if least > 1:
        yield GroupLayout(across, len(hosts), level)
        yield GroupLayout((tuple(sorted(rank for host in hosts for rank in host[:least])),), len(hosts), level)


def collective_curves(
    team: Team, layout: GroupLayout, seconds: float, advance: Callable[[int], None]
) -> list[CollectiveCurve]:
    """Measure every collective by bytes. Collective over all workers.

    Sizes and operations are measured in TURNS, because a machine is slower for a while now and then.

    Args:
        team: all workers.
        layout: groups of workers that communicate.
        seconds: time to spend on each size of each operation.
        advance: progress callback, called with the number of sizes that were just finished.
    """
    made = [(ranks, dist.new_group(list(ranks))) for ranks in layout.groups]
    mine = next((group for ranks, group in made if team.rank in ranks), None)
    found: dict[tuple[str, int], list[float]] = {
        (operation, size): [] for operation in OPERATIONS for size in sizes_on(team.device)
    }
    for turn in range(TURNS):
        for (operation, size), took in found.items():
            if turn and team.most([min(took, default=0.0)])[0] > SLOW:
                continue
            team.wait()
            if mine is not None:
                took += _timed(OPERATIONS[operation], size, mine, team.device, seconds / TURNS)
            advance(not turn)
    curves = []
    for operation in OPERATIONS:
        samples = []
        for size in sizes_on(team.device):
            each = found[operation, size]
            quick, scatter = team.most([_undisturbed(each), spread(each)] if each else [0.0, 0.0])
            samples.append(Sample((size,), rounded(quick), round(scatter, 3)))
        several = len(layout.groups)
        curves.append(CollectiveCurve(operation, layout.ranks, layout.nodes, tuple(samples), several, layout.level))
    for _, group in made:
        if group != dist.GroupMember.NON_GROUP_MEMBER:
            dist.destroy_process_group(group)
    return curves


def sizes_on(device: torch.device) -> tuple[int, ...]:
    """Return the bytes of the messages to measure on a device."""
    return GPU_SIZES if device.type == "cuda" else SIZES


Call = Callable[[int, dist.ProcessGroup, torch.device], Callable[[], int]]
"""Function of (bytes, group, device) that returns a call; the call returns how many operations it ran in sequence."""


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
    took = slowest(min(clocked()[0] for _ in range(3)))  # one slow call would reduce the number of samples too much
    calls = (clocked() for _ in range(min(MOST, max(LEAST, int(seconds / max(took, 1e-6))))))
    return [took / count for took, count in calls]


def _undisturbed(found: Sequence[float]) -> float:
    """Return the lower quartile, or the minimum of fewer than `LEAST` values.

    Where workers share cores, a message takes one of two times: its transfer time, or the time until the receiver gets
    a core again. How often the second happens is up to chance. That waiting is measured in whole steps instead, see
    `cluster.Device.overheads`.
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
        for source in ranks:  # each broadcast waits for the one before
            dist.broadcast(tensor, source, group=group)
        return len(ranks)

    return once


def _send(size: int, group: dist.ProcessGroup, device: torch.device) -> Callable[[], int]:
    tensor = _elements(size, device)
    ranks = dist.get_process_group_ranks(group)
    index = ranks.index(dist.get_rank())
    partner = partner_of(index, len(ranks))

    def once() -> int:
        if partner is None:
            return 1
        steps = (dist.send, dist.recv) if index < partner else (dist.recv, dist.send)
        for step in steps:
            step(tensor, ranks[partner], group=group)
        return 2

    return once


def partner_of(index: int, count: int) -> int | None:
    """Return with whom a worker of a group exchanges messages, by index; None: it is the odd one out.

    It is one of the other half: where a group has equally many workers of each of several hosts, another host's.
    """
    half = count // 2
    if index >= 2 * half:
        return None
    return index + half if index < half else index - half


OPERATIONS: dict[str, Call] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "reduce_scatter": _reduce_scatter,
    "all_to_all": _all_to_all,
    "broadcast": _broadcast,
    "send": _send,
}
"""Map from an operation, named as in `collective.Collective`, to the function that makes its call."""
