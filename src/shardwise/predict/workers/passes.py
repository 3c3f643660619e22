"""Order of a worker's passes in one step, with what is gathered and reduced around each, and what is in flight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np

from shardwise.predict.workers.pass_arrays import (
    BACKWARDS,
    FORWARDS,
    INPUTS,
    KINDS,
    WEIGHTS,
    Booleans,
    Integers,
    sequence,
)
from shardwise.splitting.schedule import Action, order
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Sync:
    """Collectives of `fully_shard` around one action of a stage.

    Attributes:
        blocks: whether the parameters of the blocks are all-gathered.
        root: whether the other parameters of the stage are all-gathered.
        reduces: whether gradients are reduce-scattered, and parameters freed, block by block.
    """

    blocks: bool
    root: bool
    reduces: bool


@lru_cache(maxsize=1024)
def actions_of(strategy: Strategy, pipeline_rank: int) -> Sequence[Action]:
    """Return the actions of pipeline worker `pipeline_rank` in one step, in the program's order."""
    return order(
        strategy.schedule,
        pipeline_rank,
        strategy.pp,
        strategy.stages_per_worker,
        strategy.microbatches,
        last_whole=strategy.splits_parameters,
    )


@dataclass(frozen=True, slots=True)
class EqualPasses:
    """Equal passes of one worker, which differ only in their microbatch.

    Attributes:
        action: one of the passes.
        sync: collectives of `fully_shard`; None without it.
        final: whether it is the last backward pass (B or I) of its stage, which starts the reduction of gradients.
        first: whether gradients are written for the first time; later passes accumulate into them.
        count: number of such passes.
    """

    action: Action
    sync: Sync | None
    final: bool
    first: bool
    count: int

    @property
    def kind(self) -> tuple[object, ...]:
        """Return everything that identifies the pass except its microbatch and the count."""
        return self.action.kind, self.action.stage, self.sync, self.final, self.first


def turns(strategy: Strategy, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    """Return the distinct passes of pipeline worker `pipeline_rank` in one step, with counts.

    The time needed does not grow with the number of microbatches.
    """
    return _turns(_of_order(strategy), pipeline_rank)


def table(strategy: Strategy, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    """Return all passes of pipeline worker `pipeline_rank` one by one, each with a count of 1, in execution order."""
    return _table(_of_order(strategy), pipeline_rank)


Order = tuple[bool, int, bool, int, str, int, int]
"""All that decides the order of passes, as a key: hashing a strategy takes longer than most look-ups."""


def _of_order(strategy: Strategy) -> Order:
    """Return the key that all strategies with the same order of passes share."""
    sharded = strategy.splits_parameters
    pipeline = strategy.pp, strategy.schedule, strategy.stages, strategy.microbatches
    return sharded, strategy.zero if sharded else 3, strategy.runs_module, *pipeline


def _normalized(key: Order) -> Strategy:
    """Return a strategy with an order of passes."""
    sharded, zero, module, pp, schedule, stages, microbatches = key
    fsdp, tp = 2 if sharded else 1, 1 if module else 2
    return Strategy(fsdp=fsdp, zero=zero, tp=tp, pp=pp, schedule=schedule, stages=stages, microbatches=microbatches)


def _shorter(strategy: Strategy) -> tuple[Strategy, Strategy, int]:
    """Return two strategies with few microbatches and the factor that extrapolates linearly from them to `strategy`.

    In a full pipeline each round of `pp` microbatches equals the one before it, and the two differ by one round. The
    factor is 0 if `strategy` itself is short enough.
    """
    pp, count = strategy.pp, strategy.microbatches
    few = 3 * pp + count % pp
    if count <= few + pp:
        return strategy, strategy, 0
    return strategy.with_(microbatches=few), strategy.with_(microbatches=few + pp), (count - few) // pp


@lru_cache(maxsize=65536)
def _turns(key: Order, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    strategy = _normalized(key)
    short, long, times = _shorter(strategy)
    if times:
        few, more = (_turns(_of_order(each), pipeline_rank) for each in (short, long))
        if [turn.kind for turn in few] == [turn.kind for turn in more]:
            return tuple(
                replace(a, count=a.count + times * (b.count - a.count)) for a, b in zip(few, more, strict=True)
            )
    kinds, chunks = sequence(strategy, pipeline_rank)
    found: list[EqualPasses] = []
    for chunk in range(strategy.stages_per_worker):
        found += _of_stage(strategy, kinds[chunks == chunk], chunk * strategy.pp + pipeline_rank)
    return tuple(found)


def _of_stage(strategy: Strategy, kinds: Integers, stage: int) -> Iterable[EqualPasses]:
    """Yield the distinct passes of one stage in the order of their first occurrence."""
    facts = _facts(strategy, kinds)
    codes = kinds
    for fact in facts:
        codes = codes * 2 + fact
    _, positions, counts = np.unique(codes, return_index=True, return_counts=True)
    for which in np.argsort(positions):
        at = positions[which]
        yield _pass(strategy, Action(KINDS[kinds[at]], stage, 0), facts[:, at].tolist(), int(counts[which]))


@lru_cache(maxsize=1024)
def _table(key: Order, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    strategy = _normalized(key)
    actions = actions_of(strategy, pipeline_rank)
    facts = _facts_of_worker(strategy, *sequence(strategy, pipeline_rank)).T.tolist()
    return tuple(_pass(strategy, action, each, 1) for action, each in zip(actions, facts, strict=True))


def _pass(strategy: Strategy, action: Action, facts: Sequence[bool], count: int) -> EqualPasses:
    first, final, *sync = facts
    return EqualPasses(action, Sync(*sync) if strategy.splits_parameters else None, final, first, count)


def _facts_of_worker(strategy: Strategy, kinds: Integers, chunks: Integers) -> Booleans:
    """Return `_facts` of all passes of a worker, in its order."""
    found = np.empty((5, len(kinds)), np.bool_)
    for chunk in range(strategy.stages_per_worker):
        found[:, chunks == chunk] = _facts(strategy, kinds[chunks == chunk])
    return found


def _facts(strategy: Strategy, kinds: Integers) -> Booleans:
    """Return a row for each of: `EqualPasses.first`, `final`, `Sync.blocks`, `root`, `reduces`; a column for each pass.

    With tp or pp, gradients are reduced in the last backward pass of a stage, and the earlier backward passes leave
    the parameters gathered. Otherwise each microbatch reduces its own gradients. See `LocalStages.before_backward` and
    `fsdp.split_parameters`.

    Args:
        strategy: the strategy.
        kinds: all passes of one of its stages.
    """
    module = strategy.runs_module
    apart = kinds == WEIGHTS
    index = np.arange(len(kinds))
    complete = np.flatnonzero((kinds == BACKWARDS) | apart)
    first = (kinds != FORWARDS) & (index <= (complete[0] if len(complete) else len(kinds)))
    backwards = np.flatnonzero((kinds == BACKWARDS) | (kinds == INPUTS))
    final = index == backwards[-1]
    rooted = gathers = reduces = np.zeros_like(first)
    if strategy.splits_parameters:
        others = np.flatnonzero(~apart)  # W gathers nothing, so skip it to find the preceding pass
        before = np.full(len(kinds), -1)
        before[others[1:]] = kinds[others[:-1]]
        rooted = (kinds == FORWARDS) if module else index == 0
        gathers = rooted | (~apart & (before == FORWARDS)) if strategy.zero == 3 else rooted
        reduces = ~apart & (kinds != FORWARDS) if module else final
    return np.array((first, final, gathers, rooted, reduces))


Counts = tuple[tuple[int, int, int], ...]
"""Microbatches in flight: (stage, number with saved activations, number that only wait for weight gradients)."""


@dataclass(frozen=True)
class Moment:
    """A backward pass of a worker in which its memory can be at its peak.

    Attributes:
        counts: microbatches in flight as the pass begins.
        later: whether an earlier backward pass has left gradients.
        sync: collectives of `fully_shard` around the pass; None without it. It reduces gradients if every backward pass
            does: a last one, which alone does, begins with as much as those before it have left.
    """

    counts: Counts
    later: bool
    sync: Sync | None

    @cached_property
    def saved(self) -> int:
        """Return the number of microbatches with saved activations, summed over the worker's stages."""
        return sum(saved for _, saved, _ in self.counts)


def moments(strategy: Strategy, pipeline_rank: int) -> tuple[Moment, ...]:
    """Return a worker's first backward pass and, if there are more, the one with the most microbatches in flight."""
    return _moments(_of_order(strategy), pipeline_rank)


@lru_cache(maxsize=65536)
def _moments(key: Order, pipeline_rank: int) -> tuple[Moment, ...]:
    strategy = _normalized(key)
    short, long, times = _shorter(strategy)
    if times:
        few, more = (_moments(_of_order(each), pipeline_rank) for each in (short, long))
        if all(_extends(a, b) for a, b in zip(few, more, strict=True)):
            return tuple(
                replace(a, counts=_extended(a.counts, b.counts, times)) for a, b in zip(few, more, strict=True)
            )
    kinds, chunks = sequence(strategy, pipeline_rank)
    change = np.where(kinds == FORWARDS, 1, np.where((kinds == BACKWARDS) | (kinds == WEIGHTS), -1, 0))
    before = np.cumsum(change) - change
    backward = np.flatnonzero((kinds == BACKWARDS) | (kinds == INPUTS))
    first, others = int(backward[0]), backward[1:]
    most = [first, *([int(others[np.argmax(before[others])])] if len(others) else [])]
    put_off = np.where(kinds == INPUTS, 1, np.where(kinds == WEIGHTS, -1, 0))
    syncs: list[Sync | None] = [None] * len(most)
    if strategy.splits_parameters:
        *_, gathers, rooted, reduces = _facts_of_worker(strategy, kinds, chunks)
        syncs = [Sync(bool(gathers[at]), bool(rooted[at]), bool(reduces[backward].all())) for at in most]
    return tuple(
        Moment(_counts(strategy, pipeline_rank, chunks[:end], change[:end], put_off[:end]), end != first, sync)
        for end, sync in zip(most, syncs, strict=True)
    )


def _extends(few: Moment, more: Moment) -> bool:
    """Return whether two moments differ only in the number of microbatches in flight of each stage."""
    return few.sync == more.sync and [each[0] for each in few.counts] == [each[0] for each in more.counts]


def _extended(few: Counts, more: Counts, times: int) -> Counts:
    """Extrapolate counts linearly: `few + times * (more - few)`."""
    pairs = zip(few, more, strict=True)
    return tuple((stage, a + times * (b - a), c + times * (d - c)) for (stage, a, c), (_, b, d) in pairs)


def _counts(strategy: Strategy, pipeline_rank: int, chunks: Integers, change: Integers, put_off: Integers) -> Counts:
    both, weights = (np.bincount(chunks, weights=each).astype(int) for each in (change, put_off))
    return tuple(
        (int(chunk) * strategy.pp + pipeline_rank, int(both[chunk] - weights[chunk]), int(weights[chunk]))
        for chunk in np.unique(chunks)
    )
