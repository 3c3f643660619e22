"""Compare the closed form with the dry run: predicted memory and collectives of a worker beside observed ones."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective
from shardwise.predict.closed_form.memory import worker_memory
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.predict.prediction import Memory, categories
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.workers.traffic import Key, communicated
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Crosscheck:
    """A worker of a strategy, both predicted by the closed form and observed in a dry run.

    Attributes:
        run: result of the dry run.
        memory: peak memory that the closed form predicts.
        communicated: (operation, axis, when) -> (number, bytes) of collectives that the closed form predicts.
        seconds: time that the dry run took.
    """

    run: DryRun
    memory: Memory
    communicated: Mapping[Key, tuple[int, int]]
    seconds: float

    def document(self) -> dict[str, Any]:
        """Return the comparison as the JSON object that `simulate` prints."""
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


def crosscheck(
    profiles: Profiles, strategy: Strategy, cluster: Cluster, pipeline_rank: int | None = None
) -> Crosscheck:
    """Run one worker dry, with the cuts that the closed form chooses, and compare the two.

    Args:
        profiles: profiles of the workload.
        strategy: strategy to run.
        cluster: cluster that the closed form predicts for.
        pipeline_rank: pipeline index of the worker; None selects the one that needs most memory by the closed form.

    Raises:
        StrategyError, WorkloadError: As in `dry_run`.
    """
    costs = costs_of(profiles.of(strategy), strategy, cluster)
    device = costs.times.device
    memories = [worker_memory(costs.profile, costs.strategy, worker, device) for worker in costs.parts.workers]
    if pipeline_rank is None:
        pipeline_rank = max(range(len(memories)), key=lambda number: memories[number].total)
    start = time.perf_counter()
    run = dry_run(
        profiles.workload, strategy, strategy.rank(pp=pipeline_rank), cuts=costs.parts.cuts, device=device.kind
    )
    seconds = time.perf_counter() - start
    return Crosscheck(run, memories[pipeline_rank], communicated(costs.profile, costs.parts, pipeline_rank), seconds)


def counted(collectives: Iterable[Collective]) -> dict[Key, tuple[int, int]]:
    """Count collectives: (operation, axis, when) -> (number, bytes)."""
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
