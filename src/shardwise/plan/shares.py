"""Shares of the batch for replicas on devices of different speed: each as large as its device is fast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from shardwise.cluster.cluster import Cluster
from shardwise.plan.space import divisors
from shardwise.predict.uneven import ProfileOf, replica, slowest_rank
from shardwise.strategy import Strategy

MOST_REPLICAS = 64
"""With more of them a strategy would be spelled on several lines."""


def shared_out(profile_of: ProfileOf, strategy: Strategy, cluster: Cluster, batch_size: int) -> Iterator[Strategy]:
    """A strategy (its number of microbatches settled) with shares that its replicas may do best with; none where all
    have equal devices.
    """
    ranks = [slowest_rank(strategy, cluster, number) for number in range(strategy.replicas)]
    devices = {id(cluster.device(rank)): rank for rank in ranks}
    if len(devices) == 1 or strategy.replicas > MOST_REPLICAS:
        return
    samples = strategy.samples_of(0, batch_size)
    seconds = {key: replica(profile_of, strategy, cluster, samples, rank).step_seconds for key, rank in devices.items()}
    speeds = [1 / seconds[id(cluster.device(rank))] for rank in ranks]
    said: set[tuple[int, ...]] = {strategy.parts}
    for pieces in divisors(batch_size // strategy.microbatches):
        if pieces >= strategy.replicas:
            parts = _rounded(speeds, pieces)
            found = strategy.with_(shares=":".join(map(str, parts)))
            if found.parts not in said:
                said.add(found.parts)
                yield found.with_(shares=":".join(map(str, found.parts)))


def _rounded(speeds: Sequence[float], pieces: int) -> list[int]:
    """`pieces` in proportion to speeds, one at least: each further one goes to who would be done with it first."""
    found = [1] * len(speeds)
    for _ in range(pieces - len(speeds)):
        first = min(range(len(speeds)), key=lambda number: (found[number] + 1) / speeds[number])
        found[first] += 1
    return found
