"""Holds the closed form against the dry run: what one says of a worker beside what the real program of it did."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective
from shardwise.predict.costs import costs_of
from shardwise.predict.dryrun import DryRun, dry_run
from shardwise.predict.issuing import Key, communicated
from shardwise.predict.memory import worker_memory
from shardwise.predict.prediction import Memory, categories
from shardwise.predict.profiling import Profiles
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Judged:
    """One worker of a strategy, predicted and run dry.

    Attributes:
        run: the dry run.
        memory: as the closed form predicts it.
        communicated: (operation, axis, when) -> (how many, bytes), as the closed form counts them.
        seconds: that the dry run took.
    """

    run: DryRun
    memory: Memory
    communicated: Mapping[Key, tuple[int, int]]
    seconds: float

    def document(self) -> dict[str, Any]:
        """As `simulate` prints it."""
        found = counted(self.run.collectives)
        return {
            "rank": self.run.rank,
            "memory_bytes": self.run.memory.total,
            "memory": categories(self.run.memory),
            "communicated_bytes": _total(found),
            "communicated": _rows(found),
            "kernels": len(self.run.kernels),
            "flops": self.run.flops,
            "predicted": {
                "memory_bytes": self.memory.total,
                "memory": categories(self.memory),
                "communicated_bytes": _total(self.communicated),
                "communicated": _rows(self.communicated),
            },
            "memory_error": abs(self.memory.total / self.run.memory.total - 1),
            "bytes_agree": found == dict(self.communicated),
            "seconds": self.seconds,
            "notes": list(self.run.notes),
        }


def judged(profiles: Profiles, strategy: Strategy, cluster: Cluster, place: int | None = None) -> Judged:
    """A worker run dry with the cuts of the closed form.

    Args:
        profiles: of the workload.
        strategy: how it is split.
        cluster: on what.
        place: of the worker in its pipeline; None: that which by the closed form needs most memory.

    Raises:
        StrategyError, WorkloadError: as `dry_run` does.
    """
    costs = costs_of(profiles.of(strategy), strategy, cluster)
    memories = [worker_memory(costs, worker) for worker in costs.parts.workers]
    if place is None:
        place = max(range(len(memories)), key=lambda number: memories[number].total)
    start = time.perf_counter()
    run = dry_run(
        profiles.workload, strategy, strategy.rank(pp=place), cuts=costs.parts.cuts, device=costs.times.device.kind
    )
    seconds = time.perf_counter() - start
    return Judged(run, memories[place], communicated(costs.profile, costs.parts, place), seconds)


def counted(collectives: Iterable[Collective]) -> dict[Key, tuple[int, int]]:
    """(operation, axis, when) -> (how many, bytes)."""
    found: dict[Key, tuple[int, int]] = {}
    for each in collectives:
        key = each.operation, each.axis, each.when
        count, size = found.get(key, (0, 0))
        found[key] = count + 1, size + each.bytes
    return found


def _total(counts: Mapping[Key, tuple[int, int]]) -> int:
    return sum(size for _, size in counts.values())


def _rows(counts: Mapping[Key, tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"operation": operation, "axis": axis, "when": when, "count": count, "bytes": size}
        for (operation, axis, when), (count, size) in sorted(counts.items())
    ]
