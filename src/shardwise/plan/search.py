"""The best strategies of all there are: families in the order of what they cost at least, until none can win any more.

    families -> lower bounds -> members of the best -> bounds of their own -> prediction (closed form), best bound first
    -> the best few, predicted again from profiles that were traced for them

A family is opened only when its bound is the lowest that is left, so that most are never spelled out.

The search is exact with respect to the closed form: what is left out has a lower bound above what was found.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.errors import RequestError, StrategyError, WorkloadError
from shardwise.plan.bounds import family_seconds, least_seconds, staged_seconds
from shardwise.plan.bounds_memory import least_memory
from shardwise.plan.partly import enough, fewest, may_be
from shardwise.plan.plan import Candidate, Plan, Rejected
from shardwise.plan.shares import shared_out, staged_out
from shardwise.plan.space import divisors, families, members, spellings
from shardwise.plan.standing import Queue, Standing
from shardwise.plan.wish import Wish
from shardwise.predict.condensed import Condensed
from shardwise.predict.costs import costs_of, predict
from shardwise.predict.offload import has_host
from shardwise.predict.prediction import Prediction
from shardwise.predict.profiling import Profiles
from shardwise.predict.scaled import ScaledProfiles
from shardwise.predict.simulate import profiles_on
from shardwise.predict.uneven import ProfileOf, predict_shares
from shardwise.strategy import Strategy
from shardwise.units import format_bytes, format_seconds
from shardwise.workload.workload import Workload

FINALISTS = 5
"""Of the best strategies, those that are predicted again from profiles of their own."""

NEAR = 0.02
"""By how much a strategy may be worse than the best one, and is looked at still: profiles of its own tell."""

BUCKETS = (1, 5, 100)
"""MiB of buckets that are looked at beside the usual 25."""

EQUAL = 0.001
"""By which one more option of a strategy must be worth it: predictions are not that exact."""

UNSURE = 0.01
"""By how much the chosen strategy may be predicted to be worse than the best one, if it is a simpler one."""


@dataclass(frozen=True, slots=True)
class Searched:
    """A plan, and the profiles that it was made from, to ask further questions."""

    plan: Plan
    scaled: ScaledProfiles

    @property
    def profile_of(self) -> ProfileOf:
        """The profile that a strategy is ranked by."""
        return self.scaled.of

    @property
    def profiles(self) -> Profiles:
        """Those that were traced."""
        return self.scaled.traced


def search(
    workload: Workload,
    cluster: Cluster,
    workers: int,
    wish: Wish | None = None,
    profiles: ScaledProfiles | None = None,
) -> Searched:
    """The best strategies of a workload for so many devices of a cluster.

    Args:
        workload: what to train.
        cluster: on what.
        workers: devices to use, the first ones of the cluster.
        wish: objective and constraints.
        profiles: of the workload, where there are some from an earlier search.

    Raises:
        RequestError: the cluster has fewer devices.
        WorkloadError, DataError: the workload cannot be profiled at all.
    """
    if not 1 <= workers <= cluster.size:
        raise RequestError(f"workers={workers}: {cluster.name} has {cluster.size} devices, use 1 to {cluster.size}")
    scaled = profiles or ScaledProfiles(profiles_on(workload, cluster))
    wish = wish or Wish()
    plan = _Search(workload, cluster, workers, wish, scaled).plan()
    if not plan.candidates and _may_offload(cluster, wish):
        offloading = replace(wish, fixed={**wish.fixed, "offload": "1"})
        plan = _joined(plan, _Search(workload, cluster, workers, offloading, scaled).plan())
    return Searched(plan, scaled)


def _may_offload(cluster: Cluster, wish: Wish) -> bool:
    """Whether parameters may lie in the memory of the hosts, of which enough is known: where nothing fits without."""
    known = all(nodes.device.kind == "gpu" and has_host(nodes.device) for nodes in cluster.nodes)
    return known and "offload" not in wish.fixed and wish.allows("offload", 1)


def _joined(first: Plan, second: Plan) -> Plan:
    """The first plan, which has found nothing, with what a second search has found."""
    return replace(
        first,
        candidates=second.candidates,
        rejected=(*first.rejected, *second.rejected),
        smallest=first.smallest if second.candidates else _smaller_of(first.smallest, second.smallest),
        seconds=first.seconds + second.seconds,
        looked_at=first.looked_at + second.looked_at,
        left_out=first.left_out + second.left_out,
    )


def room(cluster: Cluster, wish: Wish) -> int:
    """Bytes of a device that a strategy may take."""
    least = min(nodes.device.memory_bytes for nodes in cluster.nodes)
    return least if wish.max_memory is None else min(least, wish.max_memory)


def _smaller_of(first: Candidate | None, second: Candidate | None) -> Candidate | None:
    """The one that needs less memory."""
    there = [each for each in (first, second) if each is not None]
    return min(there, key=lambda each: each.prediction.memory.total, default=None)


@dataclass(frozen=True, slots=True)
class _Family:
    """Strategies that differ in how replicas keep parameters.

    Attributes:
        bound: least value of the objective of all of them.
        strategy: that names them, with all replicas as `dp`.
        count: how many they are.
    """

    bound: float
    strategy: Strategy
    count: int


@dataclass(slots=True)
class _Search:
    workload: Workload
    cluster: Cluster
    workers: int
    wish: Wish
    scaled: ScaledProfiles
    found: list[Candidate] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    smallest: Candidate | None = None
    looked_at: int = 0
    left_out: int = 0
    traced: Profiles = field(init=False)
    too_large: list[tuple[float, Strategy]] = field(default_factory=list)
    room: int = 0
    spans: tuple[int, ...] = ()
    """Of the cluster's levels that do not hold all workers."""
    queue: Queue[_Family | Strategy] = field(default_factory=Queue)
    standing: Standing = field(default_factory=lambda: Standing(FINALISTS, NEAR))

    def plan(self) -> Plan:
        """See `search`."""
        start = time.perf_counter()
        self.traced = self.scaled.traced
        self.room = room(self.cluster, self.wish)
        self.spans = tuple(level.span for level in self.cluster.levels if level.span < self.workers)
        best = self._simplest_first(self._with_buckets(self._with_shares(self._searched())))
        return Plan(
            workload=self.workload.name,
            cluster=self.cluster.name,
            workers=self.workers,
            wish=self.wish,
            candidates=tuple(map(self._in_few_words, best)),
            rejected=tuple(self.rejected),
            smallest=self.smallest,
            seconds=time.perf_counter() - start,
            looked_at=self.looked_at,
            left_out=self.left_out,
        )

    def _in_few_words(self, candidate: Candidate) -> Candidate:
        """Without a number of microbatches that a strategy has by itself."""
        size, strategy = self.workload.batch_size, candidate.strategy
        short = strategy.with_(microbatches=0)
        try:
            same = "microbatches" not in self.wish.fixed and short.for_batch(size) == strategy.for_batch(size)
        except StrategyError:
            return candidate
        return replace(candidate, strategy=short) if same else candidate

    # ---- what there is ----------------------------------------------------------------------------------------------

    def _families(self) -> list[_Family]:
        """Those that the model allows and that may fit, with their bounds."""
        links, tensor = self._cut(), [1]
        if links > 1:
            degrees = self.traced.tensor_degrees()
            for tp in divisors(self.workers)[1:]:
                refusal = degrees.refusal(tp)
                if refusal is None:
                    tensor.append(tp)
                else:
                    self.rejected.append(Rejected(Strategy(tp=tp), refusal, "model"))
        found: list[_Family] = []
        known: dict[tuple[int, int, int], list[dict[str, Any]]] = {}
        for family in families(self.workers, self.workload.batch_size, self.wish, tensor, links):
            key = family.dp, family.pp, family.tp
            if key not in known:
                known[key] = spellings(family, self.wish, self.spans)
            spelled = known[key]
            if not spelled:
                continue
            try:
                profile = self.scaled.condensed(_whole(family))
            except (StrategyError, WorkloadError) as error:
                self.rejected.append(Rejected(family, str(error), "model", len(spelled)))
                continue
            smallest = family.with_(**spelled[0])  # the most sharded one
            size = least_memory(profile, smallest)
            if size > self.room and not self._may_be_smaller(profile, smallest):
                self._cannot_fit(smallest, size, len(spelled))
                continue
            memory = self.wish.objective == "memory"
            bound = size if memory else family_seconds(profile, family, self.cluster)
            found.append(_Family(bound, family, len(spelled)))
        return found

    def _cannot_fit(self, strategy: Strategy, least: float, count: int) -> None:
        self.left_out += count
        self._too_large(strategy, least, "at least ", count)
        self.too_large.append((least, strategy))

    def _may_be_smaller(self, profile: Condensed, strategy: Strategy) -> bool:
        """Whether a strategy that does not fit may, with something computed again."""
        return self._may_be_selective(profile, strategy) or self._may_be_partly(profile, strategy)

    def _may_be_selective(self, profile: Condensed, strategy: Strategy) -> bool:
        """Whether it may with all computed again that are no results of products."""
        return self._may_be(profile, strategy, "selective")

    def _may_be_partly(self, profile: Condensed, strategy: Strategy) -> bool:
        """Whether it may with some of its blocks computed again."""
        return may_be(profile, strategy) and self._may_be(profile, strategy, "full")

    def _may_be(self, profile: Condensed, strategy: Strategy, recompute: str) -> bool:
        if strategy.recomputes or self.wish.objective == "memory":
            return False
        if not (self.wish.allows("recompute", "none") and self.wish.allows("recompute", recompute)):
            return False
        return least_memory(profile, strategy.with_(recompute=recompute)) <= self.room

    def _closer(self, family: _Family) -> float:
        """A higher bound of a family, where there is one; infinite where none of it fits."""
        if self.wish.objective == "memory":
            return family.bound
        strategy, whole = family.strategy, _whole(family.strategy)
        smallest = strategy.with_(**spellings(strategy, self.wish, self.spans)[0])
        condensed = self.scaled.condensed(whole)
        try:
            size = least_memory(condensed, smallest)
            if size > self.room:  # the one that needs least of them all, with as many blocks as must be
                partly = fewest(self.scaled.of(whole), condensed, smallest, self.cluster, self.room)
                selective = self._may_be_selective(condensed, smallest)
                if partly is None and not selective:
                    self._cannot_fit(smallest, size, family.count)
                    return math.inf
                if partly is not None and not selective:
                    strategy = strategy.with_(recompute=partly.recompute)
            if strategy.pp == 1 and not strategy.recomputes:
                return family.bound
            return max(family.bound, staged_seconds(self.scaled.of(whole), strategy, self.cluster))
        except (StrategyError, WorkloadError):
            return family.bound  # its members tell why

    def _members(self, family: Strategy) -> list[tuple[float, Strategy]]:
        """(least value of the objective, strategy) of those of a family that may fit."""
        every, profile = list(members(family, self.wish, self.spans)), self.scaled.condensed(_whole(family))
        sizes = [least_memory(profile, strategy) for strategy in every]
        fitting = [(size, strategy) for size, strategy in zip(sizes, every, strict=True) if size <= self.room]
        if self.wish.objective == "memory":
            found = fitting
        else:
            found = [(least_seconds(profile, strategy, self.cluster), strategy) for _, strategy in fitting]
        if len(fitting) < len(every):
            least = min(size for size in sizes if size > self.room)
            self._cannot_fit(every[sizes.index(least)], least, len(every) - len(fitting))
            for strategy, size in zip(every, sizes, strict=True):
                found += self._smaller(strategy) if size > self.room else []
        return found

    def _smaller(self, strategy: Strategy) -> list[tuple[float, Strategy]]:
        """(bound, strategy) with something computed again, for one that does not fit as it is."""
        return [entry for entry in (self._selective(strategy), self._partly(strategy)) if entry is not None]

    def _selective(self, strategy: Strategy) -> tuple[float, Strategy] | None:
        """(bound, strategy) with all computed again that are no results of products."""
        condensed = self.scaled.condensed(_whole(_family_of(strategy)))
        if not self._may_be_selective(condensed, strategy):
            return None
        selective = strategy.with_(recompute="selective")
        return least_seconds(condensed, selective, self.cluster), selective

    def _partly(self, strategy: Strategy) -> tuple[float, Strategy] | None:
        """(bound, strategy) with some blocks computed again."""
        try:
            whole = _whole(_family_of(strategy))
            condensed = self.scaled.condensed(whole)
            if not self._may_be_partly(condensed, strategy):
                return None
            profile = self.scaled.of(whole)
            partly = fewest(profile, condensed, strategy, self.cluster, self.room)
            if partly is None:
                return None
            staged = staged_seconds(profile, _family_of(partly), self.cluster)
        except (StrategyError, WorkloadError):
            return None
        return max(staged, least_seconds(condensed, strategy, self.cluster)), partly

    def _is_partly(self, strategy: Strategy) -> bool:
        """Whether a part of the blocks is computed again so that it fits, not because it was asked for."""
        return "/" in strategy.recompute and "recompute" not in self.wish.fixed

    def _cut(self) -> int:
        """Pieces that the step can be cut into; 1 where it cannot be traced, and the reason noted."""
        profile = self.scaled.one()
        if not profile.cut:
            reason = f"cannot be traced ({'; '.join(profile.notes)}), so that tp and pp are not possible"
            self.rejected.append(Rejected(Strategy(tp=2), reason, "model"))
            self.rejected.append(Rejected(Strategy(pp=2), reason, "model"))
            return 1
        return len(profile.links)

    # ---- the way through it -----------------------------------------------------------------------------------------

    def _searched(self) -> list[Candidate]:
        """All that fit, best first, as `_judged`.

        Where a finalist does not fit as it was traced, others are looked at that need not be better than it.
        """
        for family in self._families():
            self.queue.add(family.bound, family)
        judged: list[Candidate] | None = None
        while judged is None:
            self._look()
            judged = self._judged()
        self._leave_out()
        if not judged:  # how much is missing is known only of what was predicted
            for _, strategy in sorted(self.too_large, key=lambda entry: entry[0])[:FINALISTS]:
                self._predicted(strategy, anyway=True)
        return judged

    def _look(self) -> None:
        """Families and strategies by their bounds, until the next one cannot be among the finalists."""
        self.standing = Standing(FINALISTS, NEAR)
        for candidate in self.found:
            self.standing.add(self._value(candidate.prediction), candidate.strategy.kind)
        while self.queue.least <= self.standing.limit and self.queue.least < math.inf:
            bound, what = self.queue.take()
            if isinstance(what, _Family):
                self._open(bound, what)
                continue
            slower = self._seconds_above(what)
            if slower is not None:
                self.queue.add(max(bound, slower), what)
                continue
            found = self._predicted(what)
            if found is None:
                self._add_smaller(bound, what)
            else:
                self.found.append(found)
                self.standing.add(self._value(found.prediction), found.strategy.kind)

    def _open(self, bound: float, family: _Family) -> None:
        """Puts the members of a family into the queue, or itself with a higher bound."""
        closer = self._closer(family)
        if bound < closer < math.inf:
            self.queue.add(closer, replace(family, bound=closer))
        elif closer <= bound:
            for least, strategy in self._members(family.strategy):
                self.queue.add(max(bound, least), strategy)

    def _add_smaller(self, bound: float, strategy: Strategy) -> None:
        """Into the queue, with something computed again, where a strategy does not fit as it is."""
        for least, smaller in self._smaller(strategy):
            self.queue.add(max(bound, least), smaller)

    def _seconds_above(self, strategy: Strategy) -> float | None:
        """Seconds that a strategy takes at least, where blocks are computed again so that it fits; None: it may win.

        With as many blocks as it takes to fit it is slower than with the fewest that may do. Where those are no
        finalist's and not the best of its kind either, it need not be known how many it takes.
        """
        limit = self.standing.limit_of(strategy.kind)
        if not self._is_partly(strategy) or self.wish.objective == "memory" or limit == math.inf:
            return None
        try:
            seconds = costs_of(self.scaled.of(strategy), strategy, self.cluster).step_seconds
        except (StrategyError, WorkloadError):
            return None  # `_predicted` tells why
        return seconds if seconds > limit else None

    def _leave_out(self) -> None:
        """Those that cannot win, by what they compute: replicas in all spellings together."""
        together: dict[Strategy, list[tuple[float, int]]] = {}
        for bound, what in self.queue:
            family, count = (what.strategy, what.count) if isinstance(what, _Family) else (_family_of(what), 1)
            together.setdefault(family, []).append((bound, count))
        for family, entries in together.items():
            least, count = min(bound for bound, _ in entries), sum(count for _, count in entries)
            needed = format_bytes(least) if self.wish.objective == "memory" else format_seconds(least)
            self.left_out += count
            self.rejected.append(Rejected(family, _cannot_win(needed), "slower", count))

    def _predicted(self, strategy: Strategy, *, anyway: bool = False) -> Candidate | None:
        """What a strategy costs; None, and noted, where it cannot be or does not fit.

        Where it cannot fit its time is not predicted, except `anyway`.
        """
        try:
            profile = self.scaled.of(strategy)
            if self._is_partly(strategy):
                enough_again = enough(profile, strategy, self.cluster, self.room)
                if enough_again is None or self.wish.refusal(enough_again) is not None:
                    return None
                strategy = enough_again
            costs = costs_of(profile, strategy, self.cluster)
            if not anyway and (least := costs.least_memory) > self.room:
                self._cannot_fit(strategy, least, 1)
                return None
            candidate = Candidate(strategy, costs.prediction())
        except (StrategyError, WorkloadError) as error:
            self.rejected.append(Rejected(strategy, str(error), "model"))
            return None
        self.looked_at += 1
        return candidate if self._fits(candidate) else None

    def _fits(self, candidate: Candidate) -> bool:
        memory = candidate.prediction.memory.total
        if memory <= self.room:
            return True
        if self.smallest is None or memory < self.smallest.prediction.memory.total:
            self.smallest = candidate
        self._too_large(candidate.strategy, memory, "")
        return False

    def _too_large(self, strategy: Strategy, size: float, least: str, count: int = 1) -> None:
        reason = f"needs {least}{format_bytes(size)} of a device, there are {format_bytes(self.room)}"
        self.rejected.append(Rejected(strategy, reason, "memory", count))

    def _value(self, prediction: Prediction) -> float:
        """What is to be small."""
        return float(prediction.memory.total) if self.wish.objective == "memory" else prediction.step_seconds

    def _rank(self, candidate: Candidate) -> tuple[float, float, int]:
        """Best first; of two that are as good as equal the one with fewer words."""
        prediction, words = candidate.prediction, _words(candidate.strategy)
        other = prediction.step_seconds if self.wish.objective == "memory" else prediction.memory.total
        return self._value(prediction) * (1 + EQUAL * words), other, words

    def _judged(self) -> list[Candidate] | None:
        """All that fit, best first, the finalists predicted from profiles of their own; None: one does not fit then.

        It is not among those that were found any more, and what of it is computed again comes into the queue.
        """
        ranked = sorted(self.found, key=self._rank)
        judged: list[Candidate] = []
        for candidate in ranked[:FINALISTS]:
            again = self._traced(candidate.strategy)
            if again is None:
                self.found.remove(candidate)
                self._add_smaller(self._value(candidate.prediction), candidate.strategy)
            else:
                judged.append(again)
        if len(judged) < len(ranked[:FINALISTS]):
            return None
        return sorted(judged, key=self._rank) + ranked[FINALISTS:]

    def _with_shares(self, judged: list[Candidate]) -> list[Candidate]:
        """With shares, or stages, of the finalists' devices of different speed to match, where that is better."""
        found: list[Candidate] = []
        if self.wish.objective != "memory":
            for candidate in judged[:FINALISTS]:
                found += self._shared_out(candidate)
        return sorted([*found, *judged], key=self._rank) if found else judged

    def _with_buckets(self, judged: list[Candidate]) -> list[Candidate]:
        """With other sizes of buckets of the finalists that add gradients up in buckets."""
        found: list[Candidate] = []
        if self.wish.objective != "memory" and "bucket" not in self.wish.fixed:
            for candidate in judged[:FINALISTS]:
                strategy = candidate.strategy
                if strategy.sums_in_buckets and not strategy.shares:
                    others = [self._in_buckets(strategy.with_(bucket=size)) for size in BUCKETS]
                    found += [each for each in others if each and self._rank(each) < self._rank(candidate)]
        return sorted([*found, *judged], key=self._rank) if found else judged

    def _in_buckets(self, strategy: Strategy) -> Candidate | None:
        return self._traced(strategy) if self.wish.refusal(strategy) is None else None

    def _shared_out(self, candidate: Candidate) -> list[Candidate]:
        """The best shares or stages of a strategy; none where equal ones are as good."""
        size, strategy = self.workload.batch_size, candidate.strategy.for_batch(self.workload.batch_size)
        every = [
            *shared_out(self.scaled.of, strategy, self.cluster, size),
            *staged_out(self.scaled.of, strategy, self.cluster, size),
        ]
        tried = [
            Candidate(shared, predict_shares(self.scaled.of, shared, self.cluster, size))
            for shared in every
            if self.wish.refusal(shared) is None
        ]
        best = min((each for each in tried if each.prediction.fits), key=self._rank, default=None)
        return [] if best is None or self._rank(best) >= self._rank(candidate) else [best]

    def _simplest_first(self, candidates: list[Candidate]) -> list[Candidate]:
        """The one with the fewest words of those that are as good as the best, as far as can be predicted, first."""
        if not candidates:
            return candidates
        best = min(self._value(candidate.prediction) for candidate in candidates)
        good = [c for c in candidates if self._value(c.prediction) <= (1 + UNSURE) * best]
        first = min(good, key=lambda c: (_words(self._in_few_words(c).strategy), *self._rank(c)))
        return [first, *(candidate for candidate in candidates if candidate is not first)]

    def _traced(self, strategy: Strategy) -> Candidate | None:
        profile = self.traced.of(strategy)
        candidate = Candidate(strategy, predict(profile, strategy, self.cluster))
        if self._fits(candidate):
            return candidate
        if not self._is_partly(strategy):
            return None
        more = enough(profile, strategy, self.cluster, self.room)
        return None if more is None else Candidate(more, predict(profile, more, self.cluster))


def _words(strategy: Strategy) -> int:
    """How much there is to say of a strategy; a part of the blocks is more than all of them."""
    return str(strategy).count(",") + ("/" in strategy.recompute)


def _cannot_win(least: str) -> str:
    return f"cannot win: needs {least} at least"


def _family_of(strategy: Strategy) -> Strategy:
    return strategy.with_(dp=strategy.replicas, fsdp=1, zero=3, outermost="dp", offload=0)


def _whole(family: Strategy) -> Strategy:
    """With weights' gradients not put off: bounds of both are the same, and one profile less is needed."""
    return family.with_(schedule="1f1b") if family.schedule == "zero-bubble" else family
