"""Order of a worker's passes in one step, with what is gathered and reduced around each, and what is in flight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
from numpy.typing import NDArray

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


Order = tuple[bool, int, int, str, int, int]
"""All that decides the order of passes, as a key: hashing a strategy takes longer than most look-ups."""


def _of_order(strategy: Strategy) -> Order:
    """Return the key that all strategies with the same order of passes share."""
    sharded = strategy.splits_parameters
    pipeline = strategy.pp, strategy.schedule, strategy.stages, strategy.microbatches
    return sharded, strategy.zero if sharded else 3, *pipeline


def _normalized(key: Order) -> Strategy:
    """Return a strategy with an order of passes."""
    sharded, zero, pp, schedule, stages, microbatches = key
    fsdp = 2 if sharded else 1
    return Strategy(fsdp=fsdp, zero=zero, pp=pp, schedule=schedule, stages=stages, microbatches=microbatches)


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
    if pipeline_rank and not strategy.splits_parameters and strategy.schedule != "zero-bubble":  # equal on every worker
        return tuple(
            replace(turn, action=replace(turn.action, stage=turn.action.stage + pipeline_rank))
            for turn in _turns(key, 0)
        )
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

    In a pipeline, gradients are reduced in the last backward pass of a stage, and the earlier backward passes leave
    the parameters gathered. Otherwise each microbatch reduces its own gradients (`Strategy.reduces_at_once`). See
    `LocalStages.before_backward` and `fsdp.split_parameters`.

    Args:
        strategy: the strategy.
        kinds: all passes of one of its stages.
    """
    at_once = strategy.reduces_at_once
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
        rooted = (kinds == FORWARDS) if at_once else index == 0
        gathers = rooted | (~apart & (before == FORWARDS)) if strategy.zero == 3 else rooted
        reduces = ~apart & (kinds != FORWARDS) if at_once else final
    return np.array((first, final, gathers, rooted, reduces))


Bytes = NDArray[np.uint8]

Counts = tuple[tuple[int, int, int], ...]
"""Microbatches in flight: (stage, number with saved activations, number that only wait for weight gradients)."""


BLOCKS, ROOT, GRADIENTS, UNSHARDED = (1 << bit for bit in range(4))
"""Bits of what `fully_shard` has left of a stage, see `Left`."""


@dataclass(frozen=True, slots=True)
class Left:
    """Tensors that `fully_shard` holds of a stage between two of its passes.

    A forward pass leaves the blocks gathered unless zero=3. A backward pass leaves them gathered, with unsharded
    gradients, until the last one of the stage: it reduces all gradients and frees all parameters.

    Attributes:
        blocks: whether the parameters of the blocks are gathered.
        root: whether the other parameters of the stage are gathered.
        gradients: whether it has gradients.
        unsharded: whether these are unsharded.
    """

    blocks: bool
    root: bool
    gradients: bool
    unsharded: bool

    @classmethod
    @lru_cache
    def of(cls, bits: int) -> Left:
        """Return what the bits `BLOCKS`, `ROOT`, `GRADIENTS` and `UNSHARDED` say."""
        return cls(*(bool(bits & bit) for bit in (BLOCKS, ROOT, GRADIENTS, UNSHARDED)))


@dataclass(frozen=True)
class Moment:
    """A pass of a worker, most often a backward pass, in which its memory can be at its peak.

    Attributes:
        stages: the stages that the pass can be of; with `fully_shard` it is one.
        counts: microbatches in flight as a backward pass begins, or as a forward pass ends.
        later: whether an earlier backward pass has left gradients; with `fully_shard`, one of the same stage.
        sync: collectives of `fully_shard` around the pass; None without it. It reduces gradients if every backward pass
            does: a last one, which alone does, begins with as much as those before it have left.
        others: (stage, what `fully_shard` holds of it) of the worker's other stages; empty without `fully_shard`.
        forward: whether it is a forward pass.
    """

    stages: tuple[int, ...]
    counts: Counts
    later: bool
    sync: Sync | None
    others: tuple[tuple[int, Left], ...] = ()
    forward: bool = False

    @cached_property
    def saved(self) -> int:
        """Return the number of microbatches with saved activations, summed over the worker's stages."""
        return sum(saved for _, saved, _ in self.counts)

    @cached_property
    def others_gathered(self) -> bool:
        """Return whether all other stages of the worker are gathered."""
        return all(left.blocks for _, left in self.others)

    @cached_property
    def others_unsharded(self) -> bool:
        """Return whether all other stages of the worker have unsharded gradients."""
        return all(left.unsharded for _, left in self.others)


def moments(strategy: Strategy, pipeline_rank: int) -> tuple[Moment, ...]:
    """Return the passes of a worker in which its memory can be at its peak, in their order.

    They are the first backward pass and, if there are more, the one with the most microbatches in flight. If
    `fully_shard` shards several stages of the worker, they are, of each stage, the backward pass with the most
    microbatches in flight and the one with the most gathered parameters and unsharded gradients; with zero=3 also such
    forward passes, for these gather a stage while another one is left gathered.
    """
    return _moments(_of_order(strategy), pipeline_rank)


@lru_cache(maxsize=65536)
def _moments(key: Order, pipeline_rank: int) -> tuple[Moment, ...]:
    strategy = _normalized(key)
    short, long, times = _shorter(strategy)
    if times:
        few, more = (_moments(_of_order(each), pipeline_rank) for each in (short, long))
        if len(few) == len(more) and all(map(_extends, few, more)):
            return tuple(
                replace(a, counts=_extended(a.counts, b.counts, times)) for a, b in zip(few, more, strict=True)
            )
    kinds, chunks = sequence(strategy, pipeline_rank)
    change = np.where(kinds == FORWARDS, 1, np.where((kinds == BACKWARDS) | (kinds == WEIGHTS), -1, 0))
    before = np.cumsum(change) - change
    backward = np.flatnonzero((kinds == BACKWARDS) | (kinds == INPUTS))
    put_off = np.where(kinds == INPUTS, 1, np.where(kinds == WEIGHTS, -1, 0))

    def counts(end: int) -> Counts:
        return _counts(strategy, pipeline_rank, chunks[:end], change[:end], put_off[:end])

    if not strategy.splits_parameters:
        each = [(at, counts(at)) for at in _first_and_most(backward, before)]
        return tuple(
            Moment(tuple(stage for stage, count, _ in found if count), found, at != backward[0], None)
            for at, found in each
        )
    facts = _facts_of_worker(strategy, kinds, chunks)
    *_, gathers, rooted, reduces = facts
    forward, every = kinds == FORWARDS, bool(reduces[backward].all())
    left = _left_before(strategy, kinds, chunks, facts)
    stages = range(pipeline_rank, strategy.stages_per_worker * strategy.pp, strategy.pp)
    if len(stages) == 1:
        most = _first_and_most(backward, before)
    else:
        candidates = [backward, *([np.flatnonzero(forward)] if strategy.zero == 3 else [])]
        most = [at for each in candidates for at in _highest(each, before, chunks, gathers == forward, left)]
    return tuple(
        Moment(
            (stages[own := int(chunks[at])],),
            counts(at + 1 if forward[at] else at),
            bool(left[own, at] & GRADIENTS),
            Sync(bool(gathers[at]), bool(rooted[at]), every),
            tuple((stage, Left.of(int(left[n, at]))) for n, stage in enumerate(stages) if n != own),
            bool(forward[at]),
        )
        for at in sorted(most)
    )


def _first_and_most(backward: Integers, before: Integers) -> list[int]:
    """Return the first backward pass and the one of the others that has the most microbatches in flight `before` it."""
    first, others = int(backward[0]), backward[1:]
    return [first, *([int(others[np.argmax(before[others])])] if len(others) else [])]


def _left_before(strategy: Strategy, kinds: Integers, chunks: Integers, facts: Booleans) -> Bytes:
    """Return what `fully_shard` has left of each stage of a worker, by rows, before each of its passes, as bits."""
    found = np.zeros((strategy.stages_per_worker, len(kinds)), np.uint8)
    for chunk, row in enumerate(found):
        own = np.flatnonzero(chunks == chunk)
        forward, reduces = kinds[own] == FORWARDS, facts[-1, own]
        blocks = BLOCKS * (~forward | (strategy.zero < 3))
        gradients = (GRADIENTS | UNSHARDED) * (np.cumsum(~forward) > 0)
        after = np.where(reduces, GRADIENTS, blocks | ROOT | gradients)
        passed = np.searchsorted(own, np.arange(len(kinds)))  # passes of this stage before each pass of the worker
        row[:] = np.where(passed, after[passed - 1], 0)
    return found


def _highest(passes: Integers, before: Integers, chunks: Integers, more: Booleans, left: Bytes) -> set[int]:
    """Return those of `passes` that have most microbatches in flight and those that hold most, for each stage.

    Args:
        passes: indices of passes of a worker, all forward or all backward.
        before: microbatches in flight before each pass of the worker.
        chunks: stage of each pass.
        more: whether a pass holds more parameters of its own stage: a backward pass that finds them gathered, or a
            forward pass that gathers them, in buffers that are there beside the parameters.
        left: see `_left_before`.
    """
    own = np.arange(len(left))[:, None] == chunks
    held = np.where(own, left & UNSHARDED | BLOCKS * more, left)
    size = sum((held & bit > 0).sum(0) for bit in (BLOCKS, UNSHARDED))
    mine = own[:, passes]
    keys = (each * len(chunks) + other for each, other in ((before, size), (size, before)))
    return {int(passes[at]) for key in keys for at in np.where(mine, key[passes], -1).argmax(1)}


def _extends(few: Moment, more: Moment) -> bool:
    """Return whether two moments differ only in the number of microbatches in flight of each stage."""
    stages = [each[0] for each in few.counts]
    return replace(few, counts=more.counts) == more and stages == [each[0] for each in more.counts]


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
