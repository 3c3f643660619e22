"""Shares of the batch, and pipeline stages, in proportion to the speed of unequal devices."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from math import gcd

from shardwise.cluster.cluster import Cluster, Device
from shardwise.options import Ratio
from shardwise.planner.search.space import divisors
from shardwise.predict.closed_form.segment_times import timed
from shardwise.predict.closed_form.step_time import slowest_at
from shardwise.predict.closed_form.unequal_shares import ProfileOf, replica, slowest_rank
from shardwise.predict.profile.profile import Profile
from shardwise.strategy import Strategy

MOST_REPLICAS = 64
"""Most replicas, or stages, that get unequal sizes: with more, the strategy would fill several lines."""

FINEST = 4
"""Largest whole number for the speed of the slowest worker, so that speeds are resolved to a quarter of it."""


def shared_out(profile_of: ProfileOf, strategy: Strategy, cluster: Cluster, batch_size: int) -> Iterator[Strategy]:
    """Yield the strategy with shares that may suit its replicas best; nothing if all replicas have equal devices.

    The strategy's number of microbatches must be settled.
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
            for parts in _near(_rounded(speeds, pieces), speeds):
                found = strategy.with_(shares=Ratio(parts))
                if found.parts not in said:
                    said.add(found.parts)
                    yield found.with_(shares=Ratio(found.parts))


def staged_out(profile_of: ProfileOf, strategy: Strategy, cluster: Cluster, batch_size: int) -> Iterator[Strategy]:
    """Yield the strategy with speeds that may suit its pipeline workers best; nothing if all have equal devices.

    The strategy's number of microbatches must be settled.
    """
    devices = [slowest_at(strategy, cluster, pipeline_rank) for pipeline_rank in range(strategy.pp)]
    if len({id(device) for device in devices}) == 1 or strategy.pp > MOST_REPLICAS:
        return
    profile = profile_of(strategy, batch_size)
    seconds = {id(device): _of_microbatch(profile, strategy, cluster, device) for device in devices}
    speeds = [1 / seconds[id(device)] for device in devices]
    said = {(1,) * strategy.pp}
    for times in range(1, FINEST + 1):  # speed of the slowest worker in whole numbers
        found = tuple(max(1, round(times * speed / min(speeds))) for speed in speeds)
        lowest = tuple(number // gcd(*found) for number in found)
        if lowest not in said:
            said.add(lowest)
            yield strategy.with_(speeds=Ratio(lowest))


def _of_microbatch(profile: Profile, strategy: Strategy, cluster: Cluster, device: Device) -> float:
    """Return the seconds of one microbatch through all stages, computed by one device."""
    times = timed(profile, cluster, strategy, device)
    return sum(sums.between(0, len(profile.segments)).device for sums in (times.forward, times.backward, times.weights))


def _near(parts: Sequence[int], speeds: Sequence[float]) -> Iterator[list[int]]:
    """Yield shares, and the same with one or two pieces moved from the slowest replica to the fastest.

    A part of a step does not depend on its samples. It weighs most on the slowest device, so that shares in proportion
    to the speeds of whole steps may leave it too much.
    """
    slow, fast = (speeds.index(chosen(speeds)) for chosen in (min, max))
    for moved in range(min(parts[slow], 3)):
        yield [count + moved * ((number == fast) - (number == slow)) for number, count in enumerate(parts)]


def _rounded(speeds: Sequence[float], pieces: int) -> list[int]:
    """Divide `pieces` in proportion to speeds, at least one each; each further piece goes where it finishes first."""
    found = [1] * len(speeds)
    for _ in range(pieces - len(speeds)):
        first = min(range(len(speeds)), key=lambda number: (found[number] + 1) / speeds[number])
        found[first] += 1
    return found
