"""Replicas that a timeline simulates: one of each kind stands for all that are like it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardwise.cluster.cluster import Cluster, Device
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class SimulatedReplica:
    """A replica that represents all replicas like it.

    Attributes:
        row, column: its coordinates along dp and fsdp.
        machines: for each pipeline rank, (slowest device, factor by which compute takes longer than usual).
    """

    row: int
    column: int
    machines: tuple[tuple[Device, float], ...]

    @property
    def kind(self) -> object:
        """Return what is equal for replicas that are alike."""
        return _described(self.machines)


def representatives(strategy: Strategy, cluster: Cluster, slowed: Mapping[int, float]) -> list[SimulatedReplica]:
    """Choose the replicas to simulate: one of each kind in each kind of fsdp group.

    Two replicas are of one kind if their pipeline workers have the same devices and factors.
    """
    rows: dict[object, list[SimulatedReplica]] = {}
    kinds = len(cluster.nodes) > 1 or bool(slowed)
    for row in range(strategy.dp if kinds else 1):
        found: dict[object, SimulatedReplica] = {}
        for column in range(strategy.fsdp if kinds else 1):
            machines = tuple(
                _machine(strategy, cluster, slowed, row, column, pipeline_rank) for pipeline_rank in range(strategy.pp)
            )
            found.setdefault(_described(machines), SimulatedReplica(row, column, machines))
        rows.setdefault(frozenset(found), list(found.values()))
    return [pipeline for found in rows.values() for pipeline in found]


def kinds_of_replicas(strategy: Strategy, cluster: Cluster, slowed: Mapping[int, float]) -> list[object]:
    """Return the kind of each replica along dp, equal for those that one simulated replica represents."""
    return [_described([_machine(strategy, cluster, slowed, row, 0, 0)]) for row in range(strategy.dp)]


def _machine(
    strategy: Strategy, cluster: Cluster, slowed: Mapping[int, float], row: int, column: int, pipeline_rank: int
) -> tuple[Device, float]:
    """Return (slowest device, largest factor) of a pipeline worker's tensor-parallel ranks, which run in step."""
    first = strategy.rank(dp=row, fsdp=column, pp=pipeline_rank)
    ranks = range(first, first + strategy.tp)
    devices = {id(device): device for device in map(cluster.device, ranks)}.values()
    slowest = min(devices, key=lambda device: max(device.flops.values(), default=0.0))
    return slowest, max(slowed.get(rank, 1.0) for rank in ranks)


def _described(machines: Sequence[tuple[Device, float]]) -> tuple[tuple[int, float], ...]:
    return tuple((id(device), factor) for device, factor in machines)
