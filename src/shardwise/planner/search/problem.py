"""Task of a search: the workload and its profiles, the devices, and the user's objective and constraints."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shardwise.cluster.cluster import Cluster, Device
from shardwise.planner.constraints import Constraints
from shardwise.planner.plan import Candidate
from shardwise.predict.closed_form.segment_times import slowest
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

EQUAL = 0.001
"""Relative gain that each further option of a strategy must bring: predictions are not more precise than that."""


def room(cluster: Cluster, workers: int, constraints: Constraints) -> int:
    """Return the bytes of a device that a strategy may use: those of the smallest, or the user's limit if lower."""
    least = cluster.least_memory(workers)
    return least if constraints.max_memory is None else min(least, constraints.max_memory)


@dataclass(frozen=True)
class SearchProblem:
    """Workload, devices, objective and constraints of a search.

    Attributes:
        workload: workload to train.
        cluster: cluster to train on.
        workers: number of devices to use, the first ones of the cluster.
        constraints: objective and constraints.
        scaled: profiles of the workload.
    """

    workload: Workload
    cluster: Cluster
    workers: int
    constraints: Constraints
    scaled: ScaledProfiles

    @cached_property
    def room(self) -> int:
        """Bytes of a device that a strategy may use."""
        return room(self.cluster, self.workers, self.constraints)

    @cached_property
    def device(self) -> Device:
        """Slowest device of the cluster, whose workers all others wait for."""
        return slowest(self.cluster, self.workload.precision)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Spans of the cluster's levels that do not reach all workers."""
        return tuple(level.span for level in self.cluster.levels if level.span < self.workers)

    @property
    def least_memory(self) -> bool:
        """Return whether the objective is memory."""
        return self.constraints.objective == "memory"

    def compile_for(self, segments: int) -> int:
        """Return the value of `compile`: the user's, else 1 on GPUs for a step that can be traced.

        There compiled parts take less time and memory; on a CPU compilation may take longer than the training.

        Args:
            segments: number of segments of the step; 1 if it cannot be traced.
        """
        wanted = int(self.constraints.fixed.get("compile", self.device.kind == "gpu" and segments > 1))
        return wanted if self.constraints.allows("compile", wanted) else 1 - wanted

    def value(self, prediction: Prediction) -> float:
        """Return the objective value to minimize: bytes of a device, or seconds of a step."""
        return float(prediction.memory.total) if self.least_memory else prediction.step_seconds

    def rank(self, candidate: Candidate) -> tuple[float, float, int]:
        """Return a sort key, best first; of two nearly equal candidates the one with fewer words comes first."""
        prediction, many = candidate.prediction, words(candidate.strategy)
        other = prediction.step_seconds if self.least_memory else prediction.memory.total
        return self.value(prediction) * (1 + EQUAL * many), other, many

    def computed_again_to_fit(self, strategy: Strategy) -> bool:
        """Return whether a part of the blocks is recomputed to fit, rather than because the user fixed it."""
        return strategy.recompute.partial and "recompute" not in self.constraints.fixed


def words(strategy: Strategy) -> int:
    """Return how complex a strategy is: its number of axes and options, less one, plus one for a part of the blocks."""
    return str(strategy).count(",") + strategy.recompute.partial
