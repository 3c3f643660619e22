"""Means that make training cheaper by changing it: what each would bring, and which of them the user allows.

Every other option computes what one process computes. These do not, so a plan offers them, and chooses one only if the
user allows what it changes (`Strategy.changes`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from shardwise.cluster.cluster import Cluster
from shardwise.errors import StrategyError, WorkloadError
from shardwise.planner.constraints import Constraints
from shardwise.planner.plan import Candidate, Offer
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.closed_form.unequal_shares import ProfileOf
from shardwise.strategy import Strategy

MEANS = (
    "compress=bf16",
    "compress=int8",
    "compress=powersgd:4",
    "compress=topk:0.01",
    "compress=sign",
    "local=16",
    "local=64",
    "local=64,outer=nesterov",
    "schedule=pipedream",
    "ps=1,staleness=4",
)
"""Means that are tried, those that change least first; of equally fast ones the first is chosen."""


@dataclass(frozen=True, slots=True)
class Means:
    """The means as they can be tried on one workload and cluster.

    Attributes:
        profile_of: profiles by strategy.
        cluster: the cluster.
        batch_size: samples of a step.
        room: bytes of a device that a strategy may use.
        constraints: the user's constraints.
    """

    profile_of: ProfileOf
    cluster: Cluster
    batch_size: int
    room: int
    constraints: Constraints

    def offers(self, bases: Iterable[Strategy]) -> Iterator[Offer]:
        """Yield for each means the fastest of the strategies with it that fit, in the order of MEANS."""
        bases = list(dict.fromkeys(bases))
        for means in MEANS:
            found = [each for base in bases if (each := self._with(base, means)) is not None]
            if found:
                best = min(found, key=lambda each: each.prediction.step_seconds)
                yield Offer(means, best)

    def _with(self, base: Strategy, means: str) -> Candidate | None:
        """Predict a strategy with a means. Returns None if the two exclude each other, or it does not fit."""
        try:
            strategy = Strategy.parse(f"{_without_order(base) if 'schedule' in means else base},{means}")
            strategy = strategy.for_batch(self.batch_size)
            if self.constraints.refusal(strategy) is not None:
                return None
            prediction = predict(self.profile_of(strategy), strategy, self.cluster)
        except (StrategyError, WorkloadError):
            return None
        return Candidate(strategy, prediction) if prediction.memory.total <= self.room else None


def _without_order(strategy: Strategy) -> Strategy:
    """Return a strategy without what it says of the order of microbatches."""
    return strategy.with_(schedule="1f1b", stages=0, microbatches=0)


def order(strategy: Strategy) -> int:
    """Return how much a strategy changes training: 0 for nothing, else the position of its means in MEANS, from 1."""
    if not strategy.changes:
        return 0
    return max((number for number, means in enumerate(MEANS, 1) if _has(strategy, means)), default=len(MEANS) + 1)


def _has(strategy: Strategy, means: str) -> bool:
    pairs = (each.partition("=") for each in means.split(","))
    return all(str(getattr(strategy, name)) == value for name, _, value in pairs)
