"""Final round of a search: the best strategies are predicted from their own profiles, and further options are tried.

Bucket sizes, and unequal shares and stages for devices of different speed, are searched among the finalists alone. So
are simpler variants of them: the search ends before it comes to those that are as much slower as predictions may err.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwise.errors import StrategyError, WorkloadError
from shardwise.options import EQUAL
from shardwise.planner.equality import WITHIN, are_equal
from shardwise.planner.means import Means, order
from shardwise.planner.plan import Candidate, Offer
from shardwise.planner.search.memory_balance import evened, may_be_evened
from shardwise.planner.search.partial_recompute import enough
from shardwise.planner.search.problem import SearchProblem, words
from shardwise.planner.search.rejections import Rejections
from shardwise.planner.search.simpler import simplifications
from shardwise.planner.search.unequal_devices import shared_out, staged_out
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.closed_form.unequal_shares import predict_shares
from shardwise.strategy import Strategy
from shardwise.workload.one_batch import in_one_batch

FINALISTS = 5
"""Number of best strategies that are predicted again from profiles traced for them."""

BUCKETS = (1, 5, 100)
"""Bucket sizes in MiB that are tried beside the default of 25."""


@dataclass(frozen=True, slots=True)
class Finalists:
    """The final round of a search: traces the best strategies and tries further options on them.

    Attributes:
        task: task of the search.
        lost: collects the strategies that do not fit.
    """

    task: SearchProblem
    lost: Rejections

    def settled(self, predicted: list[Candidate], offers: Sequence[Offer] = ()) -> list[Candidate]:
        """Try further options, simpler variants, and the means that the user allows.

        Returns all, the chosen one first, then the best first.
        """
        exact = self._with_simpler(self._with_buckets(self._with_shares(predicted)))
        best = self._simplest_first(self._with_means(exact, offers))
        return [self._in_few_words(candidate) for candidate in best]

    def offers(self, predicted: list[Candidate]) -> tuple[Offer, ...]:
        """Return what means that change training would bring for the finalists, or for replicas or stages alone."""
        if self.task.workers == 1 or self.task.least_memory or self.task.constraints.software is not None:
            return ()
        alone = [Strategy(dp=self.task.workers), Strategy(pp=self.task.workers)]
        bases = [each.strategy for each in predicted[:FINALISTS]] + alone
        means = Means(
            profile_of=self.task.scaled.of,
            cluster=self.task.cluster,
            batch_size=self.task.workload.batch_size,
            room=self.task.room,
            constraints=self.task.constraints,
        )
        return tuple(means.offers(bases))

    def _with_means(self, predicted: list[Candidate], offers: Sequence[Offer]) -> list[Candidate]:
        """Add the offers whose changes the user allows."""
        found = [offer.candidate for offer in offers if self.task.constraints.permits(offer.candidate.strategy)]
        return sorted([*found, *predicted], key=self.task.rank) if found else predicted

    def traced(self, strategy: Strategy) -> Candidate | None:
        """Predict a strategy from a profile traced for it. Returns None if it does not fit.

        The number of recomputed blocks, or the inequality of the stages, is increased as far as it takes to fit.
        """
        profile = self.task.scaled.traced.of(strategy)
        candidate = Candidate(strategy, predict(profile, strategy, self.task.cluster))
        if self.lost.fits(candidate):
            return candidate
        more = None
        if self.task.computed_again_to_fit(strategy):
            more = enough(profile, strategy, self.task.cluster, self.task.room)
        elif strategy.speeds and may_be_evened(strategy.with_(speeds=EQUAL), self.task.cluster):
            more = evened(profile, strategy.with_(speeds=EQUAL), self.task.cluster, self.task.room)
        return None if more is None else Candidate(more, predict(profile, more, self.task.cluster))

    def _with_shares(self, predicted: list[Candidate]) -> list[Candidate]:
        """Add the finalists with shares or stages that match devices of different speed, where that is better."""
        found: list[Candidate] = []
        if not self.task.least_memory:
            for candidate in predicted[:FINALISTS]:
                found += self._shared_out(candidate)
        return sorted([*found, *predicted], key=self.task.rank) if found else predicted

    def _shared_out(self, candidate: Candidate) -> list[Candidate]:
        """Return the best unequal shares or stages of a strategy; empty if equal ones are as good."""
        size, strategy = self.task.workload.batch_size, candidate.strategy.for_batch(self.task.workload.batch_size)
        every = [
            *shared_out(self.task.scaled.of, strategy, self.task.cluster, size),
            *staged_out(self.task.scaled.of, strategy, self.task.cluster, size),
        ]
        tried = [
            Candidate(shared, predict_shares(self.task.scaled.of, shared, self.task.cluster, size))
            for shared in every
            if self.task.constraints.refusal(shared) is None
        ]
        best = min((each for each in tried if each.prediction.fits), key=self.task.rank, default=None)
        return [] if best is None or self.task.rank(best) >= self.task.rank(candidate) else [best]

    def _with_buckets(self, predicted: list[Candidate]) -> list[Candidate]:
        """Add the finalists that all-reduce gradients in buckets with other bucket sizes, where that is better."""
        found: list[Candidate] = []
        if not self.task.least_memory and "bucket" not in self.task.constraints.fixed:
            for candidate in predicted[:FINALISTS]:
                strategy = candidate.strategy
                if strategy.sums_in_buckets and not strategy.shares:
                    others = [self._in_buckets(strategy.with_(bucket=size)) for size in BUCKETS]
                    found += [each for each in others if each and self.task.rank(each) < self.task.rank(candidate)]
        return sorted([*found, *predicted], key=self.task.rank) if found else predicted

    def _in_buckets(self, strategy: Strategy) -> Candidate | None:
        return self.traced(strategy) if self.task.constraints.refusal(strategy) is None else None

    def _with_simpler(self, predicted: list[Candidate]) -> list[Candidate]:
        """Add the simpler variants of the finalists that are equal to the best, and their simpler variants."""
        if self.task.least_memory or not predicted:
            return predicted
        best = min(predicted, key=lambda candidate: self.task.value(candidate.prediction))
        known = {self._settled(candidate.strategy) for candidate in predicted}
        equal = [candidate for candidate in predicted[:FINALISTS] if are_equal(candidate, best)]
        found: list[Candidate] = []
        for candidate in equal:  # grows
            for strategy in map(self._settled, simplifications(self._in_few_words(candidate).strategy)):
                if strategy is None or strategy in known:
                    continue
                known.add(strategy)
                other = self._equal_to(best, strategy)
                if other is not None:
                    found.append(other)
                    equal.append(other)
        return sorted([*found, *predicted], key=self.task.rank) if found else predicted

    def _settled(self, strategy: Strategy) -> Strategy | None:
        """Return a strategy with its number of microbatches. Returns None if the batch cannot be cut for it."""
        try:
            return strategy.for_batch(self.task.workload.batch_size)
        except StrategyError:
            return None

    def _equal_to(self, best: Candidate, strategy: Strategy) -> Candidate | None:
        """Predict a strategy. Returns None if it is impossible, does not fit, or is not equal to the best."""
        if self.task.constraints.refusal(strategy) is not None:
            return None
        found: Candidate | None = None
        try:
            in_one_batch(self.task.workload, strategy)
            like = strategy.with_(compile=best.strategy.compile)  # in profiles that the search has, and no slower
            for profiles, tried in ((self.task.scaled, like), (self.task.scaled.traced, strategy)):
                found = Candidate(strategy, predict(profiles.of(tried), tried, self.task.cluster))
                if found.prediction.memory.total > self.task.room or not are_equal(found, best):
                    return None
        except (StrategyError, WorkloadError):
            return None
        return found

    def _simplest_first(self, candidates: list[Candidate]) -> list[Candidate]:
        """Move the simplest strategy to the front.

        Of those that are equal to the best it is the one that changes training least, then the one with fewest `words`.
        """
        if not candidates:
            return candidates
        best = min(candidates, key=lambda candidate: self.task.value(candidate.prediction))
        good = [candidate for candidate in candidates if self._are_equal(candidate, best)]
        first = min(good, key=lambda c: (order(c.strategy), words(self._in_few_words(c).strategy), *self.task.rank(c)))
        return [first, *(candidate for candidate in candidates if candidate is not first)]

    def _are_equal(self, candidate: Candidate, best: Candidate) -> bool:
        """Return whether a strategy is as good as the best one as far as predictions can tell."""
        if self.task.least_memory:
            return candidate.prediction.memory.total <= (1 + WITHIN) * best.prediction.memory.total
        return are_equal(candidate, best)

    def _in_few_words(self, candidate: Candidate) -> Candidate:
        """Drop the number of microbatches from a strategy if it is the strategy's default."""
        size, strategy = self.task.workload.batch_size, candidate.strategy
        short = strategy.with_(microbatches=0)
        try:
            same = "microbatches" not in self.task.constraints.fixed and short.for_batch(size) == strategy.for_batch(
                size
            )
        except StrategyError:
            return candidate
        return replace(candidate, strategy=short) if same else candidate
