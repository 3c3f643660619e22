"""What a search is for: the workload and its profiles, the devices, and what is wished for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from shardwise.cluster.cluster import Cluster
from shardwise.plan.plan import Candidate
from shardwise.plan.wish import Wish
from shardwise.predict.prediction import Prediction
from shardwise.predict.scaled import ScaledProfiles
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

EQUAL = 0.001
"""By which one more option of a strategy must be worth it: predictions are not that exact."""


def room(cluster: Cluster, wish: Wish) -> int:
    """Bytes of a device that a strategy may take."""
    least = min(nodes.device.memory_bytes for nodes in cluster.nodes)
    return least if wish.max_memory is None else min(least, wish.max_memory)


@dataclass(frozen=True)
class Task:
    """See the module.

    Attributes:
        workload: what to train.
        cluster: on what.
        workers: devices to use, the first ones of the cluster.
        wish: objective and constraints.
        scaled: profiles of the workload.
    """

    workload: Workload
    cluster: Cluster
    workers: int
    wish: Wish
    scaled: ScaledProfiles

    @cached_property
    def room(self) -> int:
        """Bytes of a device that a strategy may take."""
        return room(self.cluster, self.wish)

    @cached_property
    def spans(self) -> tuple[int, ...]:
        """Of the cluster's levels that do not hold all workers."""
        return tuple(level.span for level in self.cluster.levels if level.span < self.workers)

    @property
    def least_memory(self) -> bool:
        """Whether memory is what is to be small."""
        return self.wish.objective == "memory"

    def value(self, prediction: Prediction) -> float:
        """What is to be small."""
        return float(prediction.memory.total) if self.least_memory else prediction.step_seconds

    def rank(self, candidate: Candidate) -> tuple[float, float, int]:
        """Best first; of two that are as good as equal the one with fewer words."""
        prediction, many = candidate.prediction, words(candidate.strategy)
        other = prediction.step_seconds if self.least_memory else prediction.memory.total
        return self.value(prediction) * (1 + EQUAL * many), other, many

    def computed_again_to_fit(self, strategy: Strategy) -> bool:
        """Whether a part of the blocks is computed again so that it fits, not because it was asked for."""
        return "/" in strategy.recompute and "recompute" not in self.wish.fixed


def words(strategy: Strategy) -> int:
    """How much there is to say of a strategy; a part of the blocks is more than all of them."""
    return str(strategy).count(",") + ("/" in strategy.recompute)
