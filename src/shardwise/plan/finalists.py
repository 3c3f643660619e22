"""The last look at the best strategies of a search: predicted from profiles of their own, with options tried on them.

Buckets, and shares and stages of devices of different speed, are looked for among the finalists alone.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from shardwise.errors import StrategyError
from shardwise.plan.evened import evened, may_be_evened
from shardwise.plan.lost import Lost
from shardwise.plan.partly import enough
from shardwise.plan.plan import Candidate
from shardwise.plan.shares import shared_out, staged_out
from shardwise.plan.task import Task, words
from shardwise.predict.costs import predict
from shardwise.predict.uneven import predict_shares
from shardwise.strategy import Strategy

FINALISTS = 5
"""Of the best strategies, those that are predicted again from profiles of their own."""

BUCKETS = (1, 5, 100)
"""MiB of buckets that are looked at beside the usual 25."""

UNSURE = 0.01
"""By how much the chosen strategy may be predicted to be worse than the best one, if it is a simpler one."""


@dataclass(frozen=True, slots=True)
class Finalists:
    """See the module.

    Attributes:
        task: what is searched for.
        lost: where those that do not fit are noted.
    """

    task: Task
    lost: Lost

    def settled(self, judged: list[Candidate]) -> list[Candidate]:
        """All that fit, best first as `traced`, with further options where they are worth it; the chosen one first."""
        best = self._simplest_first(self._with_buckets(self._with_shares(judged)))
        return [self._in_few_words(candidate) for candidate in best]

    def traced(self, strategy: Strategy) -> Candidate | None:
        """As predicted from a profile of its own, with as much computed again, or stages as unequal, as it takes; None:
        it does not fit.
        """
        profile = self.task.scaled.traced.of(strategy)
        candidate = Candidate(strategy, predict(profile, strategy, self.task.cluster))
        if self.lost.fits(candidate):
            return candidate
        more = None
        if self.task.computed_again_to_fit(strategy):
            more = enough(profile, strategy, self.task.cluster, self.task.room)
        elif strategy.speeds and may_be_evened(strategy.with_(speeds=""), self.task.cluster):
            more = evened(profile, strategy.with_(speeds=""), self.task.cluster, self.task.room)
        return None if more is None else Candidate(more, predict(profile, more, self.task.cluster))

    def _with_shares(self, judged: list[Candidate]) -> list[Candidate]:
        """With shares, or stages, of the finalists' devices of different speed to match, where that is better."""
        found: list[Candidate] = []
        if not self.task.least_memory:
            for candidate in judged[:FINALISTS]:
                found += self._shared_out(candidate)
        return sorted([*found, *judged], key=self.task.rank) if found else judged

    def _shared_out(self, candidate: Candidate) -> list[Candidate]:
        """The best shares or stages of a strategy; none where equal ones are as good."""
        size, strategy = self.task.workload.batch_size, candidate.strategy.for_batch(self.task.workload.batch_size)
        every = [
            *shared_out(self.task.scaled.of, strategy, self.task.cluster, size),
            *staged_out(self.task.scaled.of, strategy, self.task.cluster, size),
        ]
        tried = [
            Candidate(shared, predict_shares(self.task.scaled.of, shared, self.task.cluster, size))
            for shared in every
            if self.task.wish.refusal(shared) is None
        ]
        best = min((each for each in tried if each.prediction.fits), key=self.task.rank, default=None)
        return [] if best is None or self.task.rank(best) >= self.task.rank(candidate) else [best]

    def _with_buckets(self, judged: list[Candidate]) -> list[Candidate]:
        """With other sizes of buckets of the finalists that add gradients up in buckets."""
        found: list[Candidate] = []
        if not self.task.least_memory and "bucket" not in self.task.wish.fixed:
            for candidate in judged[:FINALISTS]:
                strategy = candidate.strategy
                if strategy.sums_in_buckets and not strategy.shares:
                    others = [self._in_buckets(strategy.with_(bucket=size)) for size in BUCKETS]
                    found += [each for each in others if each and self.task.rank(each) < self.task.rank(candidate)]
        return sorted([*found, *judged], key=self.task.rank) if found else judged

    def _in_buckets(self, strategy: Strategy) -> Candidate | None:
        return self.traced(strategy) if self.task.wish.refusal(strategy) is None else None

    def _simplest_first(self, candidates: list[Candidate]) -> list[Candidate]:
        """The one with the fewest words of those that are as good as the best, as far as can be predicted, first."""
        if not candidates:
            return candidates
        best = min(self.task.value(candidate.prediction) for candidate in candidates)
        good = [c for c in candidates if self.task.value(c.prediction) <= (1 + UNSURE) * best]
        first = min(good, key=lambda c: (words(self._in_few_words(c).strategy), *self.task.rank(c)))
        return [first, *(candidate for candidate in candidates if candidate is not first)]

    def _in_few_words(self, candidate: Candidate) -> Candidate:
        """Without a number of microbatches that a strategy has by itself."""
        size, strategy = self.task.workload.batch_size, candidate.strategy
        short = strategy.with_(microbatches=0)
        try:
            same = "microbatches" not in self.task.wish.fixed and short.for_batch(size) == strategy.for_batch(size)
        except StrategyError:
            return candidate
        return replace(candidate, strategy=short) if same else candidate
