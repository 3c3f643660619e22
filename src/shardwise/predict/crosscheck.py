"""Compare the closed form with the dry run: memory and collectives of a worker, and the seconds of the step.

The seconds of a step have three views, with the same prices of kernels and collectives:

    closed form    formulas                               (`closed_form.step_time`)
    timeline       predicted events, played               (`timeline`)
    dry run        events of the real program, played     (`dry_run.playback`)
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective
from shardwise.predict.closed_form.memory import worker_memory
from shardwise.predict.closed_form.offload import offloads
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.predict.dry_run.playback import step_seconds
from shardwise.predict.prediction import Memory, categories
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.timeline.timeline import timeline
from shardwise.predict.workers.traffic import Key, by_key, communicated
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class StepViews:
    """Seconds of one step by the closed form, by the timeline, and by dry runs of all pipeline workers."""

    closed_form: float
    timeline: float
    dry_run: float

    @property
    def errors(self) -> dict[str, float]:
        """Return by how much the closed form and the timeline differ from the dry run, relative to it, with sign."""
        return {name: getattr(self, name) / self.dry_run - 1 for name in ("closed_form", "timeline")}


@dataclass(frozen=True, slots=True)
class Crosscheck:
    """A worker of a strategy, both predicted by the closed form and observed in a dry run.

    Attributes:
        run: result of the dry run.
        memory: peak memory that the closed form predicts.
        program: collectives of the step program, in order; see `step_program`.
        communicated: (operation, axis, when) -> (number, bytes) of collectives that the closed form predicts.
        seconds: time that the dry run took.
        step: seconds of the step in three views; None if they were not asked for, or are unknown.
        unknown: reason why the seconds of the step are unknown; empty if they are known or were not asked for.
    """

    run: DryRun
    memory: Memory
    program: Sequence[Collective]
    communicated: Mapping[Key, tuple[int, int]]
    seconds: float
    step: StepViews | None = None
    unknown: str = ""

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
            "bytes_agree": found == self.communicated,
            "order_agrees": sequences(self.run.collectives) == sequences(self.program),
            "seconds": self.seconds,
            "notes": [*self.run.notes, *([self.unknown] if self.unknown else [])],
            "step_seconds": self.step.dry_run if self.step else None,
            "closed_form_seconds": self.step.closed_form if self.step else None,
            "timeline_seconds": self.step.timeline if self.step else None,
            "time_errors": self.step.errors if self.step else None,
        }


def crosscheck(
    profiles: ProfileSource,
    strategy: Strategy,
    cluster: Cluster,
    pipeline_rank: int | None = None,
    *,
    timed: bool = False,
) -> Crosscheck:
    """Run one worker dry, with the cuts that the closed form chooses, and compare the two.

    To time the step, all workers of a pipeline are run dry, one after the other.

    Args:
        profiles: profiles of the workload.
        strategy: strategy to run.
        cluster: cluster that the closed form predicts for.
        pipeline_rank: pipeline index of the worker; None selects the one that needs most memory by the closed form.
        timed: whether to compare the seconds of the step, too.

    Raises:
        StrategyError, WorkloadError: As in `dry_run`.
    """
    costs = costs_of(profiles.of(strategy), strategy, cluster)
    device = costs.times.device
    memories = [worker_memory(costs.profile, costs.strategy, worker, device) for worker in costs.parts.workers]
    if pipeline_rank is None:
        pipeline_rank = max(range(len(memories)), key=lambda number: memories[number].total)
    ranks = range(len(memories)) if timed else [pipeline_rank]
    start = time.perf_counter()
    runs = {
        rank: dry_run(profiles.workload, strategy, strategy.rank(pp=rank), cuts=costs.parts.cuts, device=device.kind)
        for rank in ranks
    }
    seconds = time.perf_counter() - start
    program = costs.stages.program
    result = Crosscheck(
        runs[pipeline_rank],
        memories[pipeline_rank],
        tuple(program.collectives(pipeline_rank)),
        communicated(program, pipeline_rank),
        seconds,
    )
    if not timed:
        return result
    if offloads(costs.strategy, device):
        return replace(result, unknown="the time of a dry run is unknown with offload=1: it does not see the copies")
    played = step_seconds(costs, list(runs.values()))
    simulated = timeline(costs.profile, strategy, cluster).prediction.step_seconds
    return replace(result, step=StepViews(costs.step_seconds, simulated, played))


def counted(collectives: Iterable[Collective]) -> dict[Key, tuple[int, int]]:
    """Count collectives: (operation, axis, when) -> (number, bytes)."""
    return by_key(Counter(collectives))


def sequences(collectives: Iterable[Collective]) -> dict[object, list[tuple[str, int, str]]]:
    """Return what each group of ranks communicates, in order: (operation, bytes, when).

    Different groups communicate independently. The values that one pass sends may go in any order, and recomputation
    begins wherever its block first needs a tensor, so that both are compared on their own.
    """
    found: dict[object, list[tuple[str, int, str]]] = {}
    for each in collectives:
        message = each.operation in ("send", "recv")
        apart = (each.operation, each.when) if message else each.when == "recompute"
        found.setdefault((each.axis, each.group, apart), []).append((each.operation, each.bytes, each.when))
    return {key: sorted(each) if each[0][0] in ("send", "recv") else each for key, each in found.items()}


def _total(counts: Mapping[Key, tuple[int, int]]) -> int:
    return sum(size for _, size in counts.values())


def _rows(counts: Mapping[Key, tuple[int, int]]) -> list[dict[str, Any]]:
    return [
        {"operation": operation, "axis": axis, "when": when, "count": count, "bytes": size}
        for (operation, axis, when), (count, size) in sorted(counts.items())
    ]
