"""Pipelines with unequal stages, cut by what fits where equal stages do not: workers that save most get fewer layers.

Terms: x the share of the model on a worker, k its microbatches in flight, S the bytes of the whole model's parameters,
gradients and optimizer state, and A the bytes that the whole model saves per microbatch:

    what fits        x (S + k A) <= room
    largest stage    the least L for which all shares min(x, L) together are the whole model: a step computes m L T

A strategy spells such stages as `speeds`. Related: Sun et al. 2024 (AdaPipe), who cut and recompute together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from math import gcd

from shardwise.cluster.cluster import Cluster, Device
from shardwise.options import Ratio
from shardwise.planner.search.memory_bounds import most_of_the_model
from shardwise.planner.search.unequal_devices import MOST_REPLICAS
from shardwise.predict.closed_form.pipeline_links import slower_links
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.prediction import Memory
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.predict.workers.cuts import cuts_of
from shardwise.predict.workers.holdings import Stage
from shardwise.strategy import Strategy

ROUNDS = 12
"""Largest number of cuts, each made from the memory that the previous cut needs."""

HALVINGS = 40
"""Bisection steps in the search for the cost of the most expensive worker."""

FINE = (20, 100, 1000)
"""Resolutions of the ratios of stages, as parts of the largest; the first that leads to the cut points is used."""


def may_be_evened(strategy: Strategy, cluster: Cluster) -> bool:
    """Return whether stages may be cut unequally to save memory: only if nothing else makes them unequal."""
    plain = strategy.stages_per_worker == 1 and not strategy.speeds and not strategy.recomputes
    return cluster.homogeneous and plain and 1 < strategy.pp <= MOST_REPLICAS


def least_share(profile: ProfileSummary, strategy: Strategy, device: Device, room: int) -> float | None:
    """Return the least possible share of the worker with the largest part of the model. Returns None if none fits."""
    return level(most_of_the_model(profile, strategy, device, room))


def level(most: Sequence[float]) -> float | None:
    """Return the least L for which all min(x, L) add up to 1. Returns None if all x together are less than 1.

    >>> level([0.25, 1.0, 1.0])
    0.375
    """
    left = 1.0
    for number, share in enumerate(sorted(most)):
        even = left / (len(most) - number)
        if share >= even:
            return even
        left -= share
    return None


def evened(profile: Profile, strategy: Strategy, cluster: Cluster, room: int) -> Strategy | None:
    """Return the strategy with stages that fit and are as equal as possible. Returns None if equal or no stages fit.

    Each cut limits the workers by the memory per layer that they needed with the previous cut, until all of them fit.
    """
    tried = strategy
    costs = costs_of(profile, tried, cluster)
    sums, stored = [0.0, *accumulate(costs.times.forward.each)], _stored(profile)
    cut_points = _cut_points(profile)
    aims = [float(room)] * strategy.pp
    for number in range(ROUNDS):
        needs = [costs.memory_at(worker) for worker in costs.parts.workers]
        if all(need.total <= room for need in needs):
            return tried if tried.speeds else None
        if number:
            aims = [aim - max(0, need.total - room) for aim, need in zip(aims, needs, strict=True)]
        most = [
            _Limit.of(need, worker.stages[0], stored, profile.saved, aim)
            for need, worker, aim in zip(needs, costs.parts.workers, aims, strict=True)
        ]
        starts = cut(sums, cut_points, most)
        if starts is None:
            return None
        tried = _spelled(profile, strategy, cluster, costs, sums, starts)
        costs = costs_of(profile, tried, cluster)
    return None


def _stored(profile: Profile) -> list[int]:
    """Return the cumulative bytes of parameters over the segments; each parameter counts where it is used first."""
    sizes = [0] * len(profile.segments)
    for parameter in profile.parameters:
        sizes[parameter.segments[0]] += parameter.bytes
    return list(accumulate(sizes, initial=0))


@dataclass(frozen=True, slots=True)
class _Limit:
    """Memory limit of a stage in bytes.

    Attributes:
        stored: cumulative bytes of parameters over the segments.
        saved: cumulative bytes saved for the backward pass over the segments.
        per_stored: bytes needed per byte of parameters, with gradients and optimizer state.
        per_saved: bytes of activations needed per saved byte of one microbatch.
        rest: bytes that do not depend on the stage's size.
        room: bytes that the stage may need in total.
    """

    stored: Sequence[int]
    saved: Sequence[int]
    per_stored: float
    per_saved: float
    rest: float
    room: float

    @classmethod
    def of(cls, need: Memory, stage: Stage, stored: Sequence[int], saved: Sequence[int], room: float) -> _Limit:
        """Derive the limit of a worker from the memory `need` that it has with `stage`."""
        first, end = stage.first, stage.end
        spread = 1 + need.fragments / need.allocated  # fragments grow with what the allocator holds
        per_stored = (need.parameters + need.gradients + need.optimizer) / max(1, stored[end] - stored[first])
        per_saved = need.activations / max(1, saved[end] - saved[first])
        rest = spread * (need.temporary + need.process) + need.context
        return cls(stored, saved, spread * per_stored, spread * per_saved, rest, room)

    def allows(self, first: int, end: int) -> bool:
        """Return whether the stage may consist of segments `first` to `end`."""
        stored, saved = self.stored[end] - self.stored[first], self.saved[end] - self.saved[first]
        return self.rest + self.per_stored * stored + self.per_saved * saved <= self.room


def _cut_points(profile: Profile) -> list[int]:
    """Return the cut points with the smallest message, as the segments before which they lie."""
    least = min(segment.message for segment in profile.segments[1:])
    return [number for number, segment in enumerate(profile.segments) if number and segment.message <= least]


def cut(sums: Sequence[float], cut_points: Sequence[int], limits: Sequence[_Limit]) -> list[int] | None:
    """Choose the starts of stages so that each stage is within its limit and the most expensive one is cheapest.

    Stages are filled from the last one on, which has fewest microbatches in flight; the first one gets the rest.

    Args:
        sums: cumulative costs: entry i is the cost of the segments before segment i, the last that of all.
        cut_points: cut points, as segments where a stage may begin, ascending.
        limits: memory limit of each stage.

    Returns:
        First segment of each stage. None if no cut is within the limits.
    """
    low, high = sums[-1] / len(limits), sums[-1]
    best = _filled(sums, cut_points, limits, high)
    if best is None:
        return None
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        found = _filled(sums, cut_points, limits, middle)
        if found is None:
            low = middle
        else:
            best, high = found, middle
    return best


def _filled(
    sums: Sequence[float], cut_points: Sequence[int], limits: Sequence[_Limit], most: float
) -> list[int] | None:
    """Return the first segments of stages that cost at most `most`. Each stage is as long as its limit allows.

    Returns None if there are no such stages.
    """
    starts: list[int] = []
    end, left = len(sums) - 1, len(cut_points)

    def may_have(limit: _Limit, end: int, first: int) -> bool:
        return sums[end] - sums[first] <= most * (1 + 1e-9) and limit.allows(first, end)

    for number in range(len(limits) - 1, 0, -1):
        first = bisect_left(cut_points, True, hi=left, key=partial(may_have, limits[number], end))
        first = max(first, number - 1)  # leaves a cut point for each stage before it
        if first >= left:
            return None
        starts.append(cut_points[first])
        end, left = cut_points[first], first
    return [0, *reversed(starts)] if may_have(limits[0], end, 0) else None


def _spelled(
    profile: Profile, strategy: Strategy, cluster: Cluster, costs: Costs, sums: Sequence[float], starts: Sequence[int]
) -> Strategy:
    """Return the strategy with speeds whose stages begin at `starts`, or as near as the finest ratios allow."""
    sizes = [sums[end] - sums[first] for first, end in pairwise([*starts, len(sums) - 1])]
    found = strategy
    for fine in FINE:
        numbers = [max(1, round(fine * size / max(sizes))) for size in sizes]
        found = strategy.with_(speeds=Ratio(number // gcd(*numbers) for number in numbers))
        cuts = cuts_of(profile, found, costs.times.forward.each, slower_links(profile, found, cluster))
        if [stage[0] for stage in cuts] == list(starts):
            break
    return found
