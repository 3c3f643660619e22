"""Families of strategies and their members, each with a lower bound on its cost, as input of the search.

A strategy that does not fit may do so with recomputation or with unequal stages; these variants are found here too.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from shardwise.errors import StrategyError, WorkloadError
from shardwise.options import FULL, NONE, SELECTIVE, Recompute
from shardwise.planner.search.memory_balance import least_share, may_be_evened
from shardwise.planner.search.memory_bounds import least_memory
from shardwise.planner.search.partial_recompute import fewest, may_be
from shardwise.planner.search.problem import SearchProblem
from shardwise.planner.search.rejections import Rejections
from shardwise.planner.search.sharded_bounds import sharded_seconds
from shardwise.planner.search.space import divisors, families, members, spellings
from shardwise.planner.search.time_bounds import family_seconds, least_seconds, staged_seconds, summed_seconds
from shardwise.predict.closed_form.segment_times import times_of
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.strategy import Strategy
from shardwise.workload.one_batch import in_one_batch


@dataclass(frozen=True, slots=True)
class Family:
    """Strategies that differ only in how replicas store parameters.

    Attributes:
        bound: lower bound on the objective of all members.
        strategy: representative of the family, with all replicas as `dp`.
        count: number of members.
    """

    bound: float
    strategy: Strategy
    count: int


@dataclass(frozen=True, slots=True)
class UnequalStages:
    """A strategy that can only fit with unequal stages."""

    strategy: Strategy


@dataclass(frozen=True, slots=True)
class Candidates:
    """Candidates of a search with their lower bounds.

    Attributes:
        task: task of the search.
        lost: collects strategies that are impossible or cannot fit.
    """

    task: SearchProblem
    lost: Rejections

    def families(self) -> list[Family]:
        """Return the families that the model allows and that may fit, with their bounds."""
        segments, tensor = self._cut(), [1]
        if segments > 1:
            degrees = self.task.scaled.traced.tensor_degrees()
            for tp in divisors(self.task.workers)[1:]:
                refusal = degrees.refusal(tp)
                if refusal is None:
                    tensor.append(tp)
                else:
                    self.lost.impossible(Strategy(tp=tp), refusal)
        found: list[Family] = []
        known: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
        for family in families(
            self.task.workers,
            self.task.workload.batch_size,
            self.task.constraints,
            tensor,
            segments,
            compile=self.task.compile_for(segments),
        ):
            key = family.dp, family.pp, family.tp
            if key not in known:
                known[key] = spellings(family, self.task.constraints, self.task.spans)
            spelled = known[key]
            if not spelled:
                continue
            try:
                in_one_batch(self.task.workload, family)
                profile = self.task.scaled.summary(_whole(family))
            except (StrategyError, WorkloadError) as error:
                self.lost.impossible(family, str(error), len(spelled))
                continue
            smallest = family.with_(**spelled[0])  # the most sharded member
            size = least_memory(profile, smallest, self.task.device)
            if size > self.task.room and not self._may_be_smaller(profile, smallest):
                self.lost.cannot_fit(smallest, size, len(spelled))
                continue
            bound = size if self.task.least_memory else family_seconds(profile, family, self.task.cluster)
            found.append(Family(bound, family, len(spelled)))
        return found

    def closer(self, family: Family) -> float:
        """Return a tighter bound of a family where there is one; infinite if no member fits."""
        if self.task.least_memory:
            return family.bound
        strategy, whole = family.strategy, _whole(family.strategy)
        smallest = strategy.with_(**spellings(strategy, self.task.constraints, self.task.spans)[0])
        summary = self.task.scaled.summary(whole)
        try:
            size = least_memory(summary, smallest, self.task.device)
            if size > self.task.room:  # recompute as few blocks as fit, for the member that needs least
                partly = fewest(self.task.scaled.of(whole), summary, smallest, self.task.cluster, self.task.room)
                uneven = self._least_share(summary, smallest) is not None
                others = uneven or self._may_be_selective(summary, smallest)
                if partly is None and not others:
                    self.lost.cannot_fit(smallest, size, family.count)
                    return math.inf
                if partly is not None and not others:
                    strategy = strategy.with_(recompute=partly.recompute)
            if strategy.pp == 1 and not strategy.recomputes:
                return family.bound
            return max(family.bound, staged_seconds(self.task.scaled.of(whole), strategy, self.task.cluster))
        except (StrategyError, WorkloadError):
            return family.bound  # the reason is recorded with its members

    def replicated_bound(self, strategy: Strategy) -> float:
        """Return the bound of a pipeline by what its replicas communicate, in seconds; 0 if there is none.

        See `sharded_seconds` and `summed_seconds`.
        """
        if self.task.least_memory or strategy.pp == 1 or strategy.replicas == 1:
            return 0.0
        try:
            profile = self.task.scaled.of(_whole(strategy))
            bound = sharded_seconds if strategy.splits_parameters else summed_seconds
            return bound(profile, strategy, self.task.cluster)
        except (StrategyError, WorkloadError):
            return 0.0  # the reason is recorded when the strategy is predicted

    def members(self, family: Strategy) -> list[tuple[float, Strategy | UnequalStages]]:
        """Return (bound on the objective, strategy) for each member of a family that may fit."""
        every = list(members(family, self.task.constraints, self.task.spans))
        profile = self.task.scaled.summary(_whole(family))
        sizes = [least_memory(profile, strategy, self.task.device) for strategy in every]
        fitting = [(size, strategy) for size, strategy in zip(sizes, every, strict=True) if size <= self.task.room]
        found: list[tuple[float, Strategy | UnequalStages]] = list(fitting)
        if not self.task.least_memory:
            found = [(least_seconds(profile, strategy, self.task.cluster), strategy) for _, strategy in fitting]
        if len(fitting) < len(every):
            least = min(size for size in sizes if size > self.task.room)
            self.lost.cannot_fit(every[sizes.index(least)], least, len(every) - len(fitting))
            for strategy, size in zip(every, sizes, strict=True):
                found += self.smaller(strategy) if size > self.task.room else []
        return found

    def smaller(self, strategy: Strategy) -> list[tuple[float, Strategy | UnequalStages]]:
        """Return (bound, variant) with recomputation or unequal stages, for a strategy that does not fit as it is."""
        every = self._selective(strategy), self._partly(strategy), self._uneven(strategy)
        return [entry for entry in every if entry is not None]

    def _uneven(self, strategy: Strategy) -> tuple[float, UnequalStages] | None:
        """Return the bound and variant with unequal stages. Returns None if no such stages can fit."""
        summary = self.task.scaled.summary(_whole(family_of(strategy)))
        share = self._least_share(summary, strategy)
        if share is None:
            return None
        times = times_of(summary, self.task.cluster, strategy)
        busy = strategy.microbatches * share * (times.forward + times.backward + times.weights)
        return max(busy, least_seconds(summary, strategy, self.task.cluster)), UnequalStages(strategy)

    def _selective(self, strategy: Strategy) -> tuple[float, Strategy] | None:
        """Return the bound and variant with selective recomputation. Returns None if that cannot fit."""
        summary = self.task.scaled.summary(_whole(family_of(strategy)))
        if not self._may_be_selective(summary, strategy):
            return None
        selective = strategy.with_(recompute=SELECTIVE)
        if strategy.gathers_again:  # which selective recomputation does not, as full does not
            summary = self.task.scaled.summary(_whole(family_of(strategy.with_(recompute=FULL))))
        return least_seconds(summary, selective, self.task.cluster), selective

    def _partly(self, strategy: Strategy) -> tuple[float, Strategy] | None:
        """Return the bound and variant that recomputes a part of the blocks. Returns None if that cannot fit."""
        try:
            whole = _whole(family_of(strategy))
            summary = self.task.scaled.summary(whole)
            if not self._may_be_partly(summary, strategy):
                return None
            profile = self.task.scaled.of(whole)
            partly = fewest(profile, summary, strategy, self.task.cluster, self.task.room)
            if partly is None:
                return None
            staged = staged_seconds(profile, family_of(partly), self.task.cluster)
        except (StrategyError, WorkloadError):
            return None
        return max(staged, least_seconds(summary, strategy, self.task.cluster)), partly

    def _may_be_smaller(self, profile: ProfileSummary, strategy: Strategy) -> bool:
        """Return whether a strategy that does not fit may do so with recomputation or unequal stages."""
        again = self._may_be_selective(profile, strategy) or self._may_be_partly(profile, strategy)
        return again or self._least_share(profile, strategy) is not None

    def _least_share(self, profile: ProfileSummary, strategy: Strategy) -> float | None:
        """Return the share of the worker with the largest part of the model, if stages are unequal so that they fit.

        Returns None if unequal stages cannot fit or may not be used.
        """
        if self.task.least_memory or not may_be_evened(strategy, self.task.cluster):
            return None
        return least_share(profile, strategy, self.task.device, self.task.room)

    def _may_be_selective(self, profile: ProfileSummary, strategy: Strategy) -> bool:
        """Return whether a strategy may fit with selective recomputation, which saves the results of matmuls."""
        return self._may_be(profile, strategy, SELECTIVE)

    def _may_be_partly(self, profile: ProfileSummary, strategy: Strategy) -> bool:
        """Return whether a strategy may fit if it recomputes a part of its blocks."""
        return may_be(profile, strategy) and self._may_be(profile, strategy, FULL)

    def _may_be(self, profile: ProfileSummary, strategy: Strategy, recompute: Recompute) -> bool:
        if strategy.recomputes or self.task.least_memory:
            return False
        if not (
            self.task.constraints.allows("recompute", NONE) and self.task.constraints.allows("recompute", recompute)
        ):
            return False
        return least_memory(profile, strategy.with_(recompute=recompute), self.task.device) <= self.task.room

    def _cut(self) -> int:
        """Return the number of segments of the step; 1, with the reason recorded, if the step cannot be traced."""
        profile = self.task.scaled.one()
        if not profile.cut:
            reason = f"cannot be traced ({'; '.join(profile.notes)}), so that tp and pp are not possible"
            self.lost.impossible(Strategy(tp=2), reason)
            self.lost.impossible(Strategy(pp=2), reason)
            return 1
        return len(profile.segments)


def family_of(strategy: Strategy) -> Strategy:
    """Return the strategy that represents the family of `strategy`."""
    return strategy.with_(dp=strategy.replicas, fsdp=1, zero=3, outermost="dp", offload=0)


def _whole(family: Strategy) -> Strategy:
    """Return the strategy whose profile bounds a family: 1f1b for zero-bubble, which saves a profile.

    Zero-bubble gathers no inputs again. Of 1f1b, only what recomputes whole blocks does not either.
    """
    if family.schedule != "zero-bubble":
        return family
    plain = family.with_(schedule="1f1b")
    return plain.with_(recompute=FULL) if plain.gathers_again else plain
