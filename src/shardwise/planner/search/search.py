"""Search for the best strategies: families are examined by lower bound, until no remaining one can win.

    families -> lower bounds -> members of the best -> bounds of their own -> prediction (closed form), best bound first
    -> the best few, predicted again from profiles that were traced for them

A family is expanded only when its bound is the lowest one left, so most families never are.

The search is exact with respect to the closed form: every strategy that is skipped has a lower bound above the best
found. The one exception is pipelines with unequal stages: their bound assumes that parameters, activations and time are
spread evenly over the model.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field, replace

from shardwise.cluster.cluster import Cluster
from shardwise.errors import RequestError, StrategyError, WorkloadError
from shardwise.options import EQUAL
from shardwise.planner.constraints import Constraints
from shardwise.planner.garbage import few_collections
from shardwise.planner.plan import Candidate, Plan
from shardwise.planner.search.candidates import Candidates, Family, UnequalStages, family_of
from shardwise.planner.search.finalists import FINALISTS, Finalists
from shardwise.planner.search.memory_balance import evened
from shardwise.planner.search.partial_recompute import enough
from shardwise.planner.search.problem import SearchProblem
from shardwise.planner.search.queue import BestSoFar, Queue
from shardwise.planner.search.rejections import Rejections
from shardwise.predict.closed_form.offload import has_host
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.closed_form.unequal_shares import ProfileOf
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.simulate import profiles_on
from shardwise.splitting.balance import Cuts, cuts_blocks
from shardwise.strategy import Strategy
from shardwise.units import format_bytes, format_seconds
from shardwise.workload.workload import Workload

NEAR = 0.02
"""Fraction by which a strategy may be worse than the best one and is still examined: traced profiles may reorder."""

COMPARED, COMPARISONS = 4, 16
"""Strategies of each kind that are predicted although they cannot win: so many that fit, of at most so many."""


@dataclass(frozen=True, slots=True)
class SearchResult:
    """A plan together with the profiles that it was made from, for further queries."""

    plan: Plan
    scaled: ScaledProfiles

    @property
    def profile_of(self) -> ProfileOf:
        """Function that returns the profile by which a strategy is ranked."""
        return self.scaled.of

    @property
    def profiles(self) -> ProfileSource:
        """Profiles that were traced, or made of sizes."""
        return self.scaled.traced

    def cuts(self, strategy: Strategy, cluster: Cluster) -> Cuts:
        """Return the predicted cuts of the model; empty if the strategy leaves the model whole."""
        if strategy.runs_module or (strategy.pp == 1 and not cuts_blocks(strategy)):
            return ()
        equal_shares = strategy.with_(shares=EQUAL)
        return costs_of(self.profile_of(equal_shares), equal_shares, cluster).parts.cuts


def search(
    workload: Workload,
    cluster: Cluster,
    workers: int,
    constraints: Constraints | None = None,
    profiles: ScaledProfiles | None = None,
) -> SearchResult:
    """Search the best strategies of a workload for the first `workers` devices of a cluster.

    Args:
        workload: workload to train.
        cluster: cluster to train on.
        workers: number of devices to use, the first ones of the cluster.
        constraints: objective and constraints.
        profiles: profiles of the workload from an earlier search, if there are any.

    Raises:
        RequestError: the cluster has fewer devices.
        WorkloadError, DataError: the workload cannot be profiled at all.
    """
    if not 1 <= workers <= cluster.size:
        raise RequestError(f"workers={workers}: {cluster.name} has {cluster.size} devices, use 1 to {cluster.size}")
    scaled = profiles or ScaledProfiles(profiles_on(workload, cluster))
    constraints = replace(constraints or Constraints(), software=scaled.traced.software)
    with few_collections():
        plan = _Search(SearchProblem(workload, cluster, workers, constraints, scaled)).plan()
        if not plan.candidates and may_offload(cluster, constraints):
            offloading = replace(constraints, fixed={**constraints.fixed, "offload": "1"})
            plan = _joined(plan, _Search(SearchProblem(workload, cluster, workers, offloading, scaled)).plan())
    return SearchResult(plan, scaled)


def may_offload(cluster: Cluster, constraints: Constraints) -> bool:
    """Return whether offloading may be tried if nothing fits without it.

    The user must not have fixed or forbidden it, and all devices must be GPUs whose hosts are known.
    """
    known = all(nodes.device.kind == "gpu" and has_host(nodes.device) for nodes in cluster.nodes)
    return known and "offload" not in constraints.fixed and constraints.allows("offload", 1)


def _joined(first: Plan, second: Plan) -> Plan:
    """Add the outcome of a second search to the first plan, which has no candidates."""
    return replace(
        first,
        candidates=second.candidates,
        rejected=(*first.rejected, *second.rejected),
        smallest=first.smallest if second.candidates else _smaller_of(first.smallest, second.smallest),
        seconds=first.seconds + second.seconds,
        looked_at=first.looked_at + second.looked_at,
        left_out=first.left_out + second.left_out,
    )


def _smaller_of(first: Candidate | None, second: Candidate | None) -> Candidate | None:
    """Return the candidate that needs less memory. Returns None if both are None."""
    there = [each for each in (first, second) if each is not None]
    return min(there, key=lambda each: each.prediction.memory.total, default=None)


@dataclass(slots=True)
class _Search:
    task: SearchProblem
    lost: Rejections = field(init=False)
    prospects: Candidates = field(init=False)
    finalists: Finalists = field(init=False)
    found: list[Candidate] = field(default_factory=list)
    looked_at: int = 0
    queue: Queue[Family | Strategy | UnequalStages] = field(default_factory=Queue)
    put_off: set[Strategy] = field(default_factory=set)
    standing: BestSoFar = field(default_factory=lambda: BestSoFar(FINALISTS, NEAR))

    def __post_init__(self) -> None:
        self.lost = Rejections(self.task.room)
        self.prospects, self.finalists = Candidates(self.task, self.lost), Finalists(self.task, self.lost)

    def plan(self) -> Plan:
        """Run the search, see `search`."""
        start = time.perf_counter()
        searched = self._searched()
        offers = self.finalists.offers(searched)
        best = self.finalists.settled(searched, offers)
        return Plan(
            workload=self.task.workload.name,
            cluster=self.task.cluster.name,
            workers=self.task.workers,
            constraints=self.task.constraints,
            candidates=tuple(best),
            rejected=tuple(self.lost.rejected),
            smallest=self.lost.smallest,
            seconds=time.perf_counter() - start,
            looked_at=self.looked_at,
            left_out=self.lost.unpredicted,
            notes=self.task.workload.notes,
            offers=offers,
        )

    def _searched(self) -> list[Candidate]:
        """Return all candidates that fit, best first, as `_predict_finalists` returns them.

        If a finalist does not fit once it was traced, the search continues with strategies that may be worse than it.
        """
        for family in self.prospects.families():
            self.queue.add(family.bound, family)
        predicted: list[Candidate] | None = None
        while predicted is None:
            self._look()
            predicted = self._predict_finalists()
        self._leave_out()
        if not predicted:  # the missing memory is only known for strategies that were predicted
            for _, strategy in sorted(self.lost.too_large, key=lambda entry: entry[0])[:FINALISTS]:
                self._predicted(strategy, anyway=True)
        return predicted

    def _look(self) -> None:
        """Examine families and strategies by bound, until the next one cannot be among the finalists."""
        self.standing = BestSoFar(FINALISTS, NEAR)
        for candidate in self.found:
            self.standing.add(self.task.value(candidate.prediction), candidate.strategy.kind)
        while self.queue.least <= self.standing.limit and self.queue.least < math.inf:
            bound, what = self.queue.take()
            if isinstance(what, Family):
                self._open(bound, what)
                continue
            if isinstance(what, UnequalStages):
                self._note(self._evened(what.strategy))
                continue
            closer = self._closer(bound, what)
            if closer > bound:
                self.queue.add(closer, what)
            else:
                self._price(bound, what)
        self._compare_kinds()

    def _closer(self, bound: float, strategy: Strategy) -> float:
        """Return a tighter bound that takes longer to compute than `bound`; `bound` itself if the strategy may win."""
        closer = max(bound, self.prospects.replicated_bound(strategy))
        if closer > self.standing.limit:
            self.put_off.add(strategy)
        return closer if closer > bound else max(bound, self._seconds_above(strategy) or 0.0)

    def _price(self, bound: float, strategy: Strategy) -> None:
        """Predict a strategy. If it does not fit, queue its variants with recomputation or unequal stages."""
        found = self._predicted(strategy)
        if found is None:
            self._add_smaller(bound, strategy)
        self._note(found)

    def _compare_kinds(self) -> None:
        """Predict the most promising of the strategies that were put off, a few of each kind.

        None of them can win. The explanation compares the best strategy with them, on this cluster and on others.
        """
        for kind in sorted({strategy.kind for strategy in self.put_off}):
            own = {strategy for strategy in self.put_off if strategy.kind == kind}
            before = len(self.found)
            for _ in range(min(COMPARISONS, len(own))):
                if len(self.found) == before + COMPARED:
                    break
                bound, strategy = self.queue.take_first(own)
                own.remove(strategy)
                self._price(bound, strategy)
        self.put_off.clear()

    def _note(self, found: Candidate | None) -> None:
        """Record a candidate that fits; ignore None."""
        if found is not None:
            self.found.append(found)
            self.standing.add(self.task.value(found.prediction), found.strategy.kind)

    def _evened(self, strategy: Strategy) -> Candidate | None:
        """Predict a strategy with unequal stages that fit. Returns None if there are none or they are excluded."""
        try:
            fitting = evened(self.task.scaled.of(strategy), strategy, self.task.cluster, self.task.room)
        except (StrategyError, WorkloadError):
            return None  # the reason was recorded for equal stages
        return (
            None if fitting is None or self.task.constraints.refusal(fitting) is not None else self._predicted(fitting)
        )

    def _open(self, bound: float, family: Family) -> None:
        """Put the members of a family into the queue, or the family itself if it has a tighter bound."""
        closer = self.prospects.closer(family)
        if bound < closer < math.inf:
            self.queue.add(closer, replace(family, bound=closer))
        elif closer <= bound:
            for least, strategy in self.prospects.members(family.strategy):
                self.queue.add(max(bound, least), strategy)

    def _add_smaller(self, bound: float, strategy: Strategy) -> None:
        """Queue the variants with recomputation or unequal stages of a strategy that does not fit as it is."""
        for least, smaller in self.prospects.smaller(strategy):
            self.queue.add(max(bound, least), smaller)

    def _seconds_above(self, strategy: Strategy) -> float | None:
        """Return a lower bound in seconds for a strategy that recomputes blocks to fit. Returns None if it may win.

        The strategy has the fewest recomputed blocks that may fit; more blocks make it slower. If already this one is
        no finalist and not the best of its kind, the number of blocks that fits need not be found.
        """
        limit = self.standing.limit_of(strategy.kind)
        if not self.task.computed_again_to_fit(strategy) or self.task.least_memory or limit == math.inf:
            return None
        try:
            seconds = costs_of(self.task.scaled.of(strategy), strategy, self.task.cluster).step_seconds
        except (StrategyError, WorkloadError):
            return None  # `_predicted` records the reason
        return seconds if seconds > limit else None

    def _leave_out(self) -> None:
        """Record the remaining queue as strategies that cannot win, one entry for each family."""
        together: dict[Strategy, list[tuple[float, int]]] = {}
        for bound, what in self.queue:
            strategy = what if isinstance(what, Strategy) else what.strategy
            family, count = (strategy, what.count) if isinstance(what, Family) else (family_of(strategy), 1)
            together.setdefault(family, []).append((bound, count))
        for family, entries in together.items():
            least, count = min(bound for bound, _ in entries), sum(count for _, count in entries)
            needed = format_bytes(least) if self.task.least_memory else format_seconds(least)
            self.lost.cannot_win(family, needed, count)

    def _predicted(self, strategy: Strategy, *, anyway: bool = False) -> Candidate | None:
        """Predict a strategy. Returns None, and records the reason, if it is impossible or does not fit.

        A strategy that cannot fit is not predicted, except if `anyway` is true.
        """
        try:
            profile = self.task.scaled.of(strategy)
            if self.task.computed_again_to_fit(strategy):
                enough_again = enough(profile, strategy, self.task.cluster, self.task.room)
                if enough_again is None or self.task.constraints.refusal(enough_again) is not None:
                    return None
                strategy = enough_again
            costs = costs_of(profile, strategy, self.task.cluster)
            if not anyway and (least := costs.least_memory) > self.task.room:
                self.lost.cannot_fit(strategy, least, 1)
                return None
            candidate = Candidate(strategy, costs.prediction())
        except (StrategyError, WorkloadError) as error:
            self.lost.impossible(strategy, str(error))
            return None
        self.looked_at += 1
        return candidate if self.lost.fits(candidate) else None

    def _predict_finalists(self) -> list[Candidate] | None:
        """Return all candidates that fit, best first, with the finalists predicted from profiles traced for them.

        Returns None if a finalist then does not fit. It is removed from the candidates, and its variants with
        recomputation or unequal stages are queued.
        """
        ranked = sorted(self.found, key=self.task.rank)
        predicted: list[Candidate] = []
        for candidate in ranked[:FINALISTS]:
            again = self.finalists.traced(candidate.strategy)
            if again is None:
                self.found.remove(candidate)
                self._add_smaller(self.task.value(candidate.prediction), candidate.strategy)
            else:
                predicted.append(again)
        if len(predicted) < len(ranked[:FINALISTS]):
            return None
        return sorted(predicted, key=self.task.rank) + ranked[FINALISTS:]
