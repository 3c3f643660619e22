"""Order of a worker's passes in one step, with what is gathered and reduced around each, and what is in flight."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np

from shardwise.predict.workers.pass_arrays import BACKWARDS, FORWARDS, INPUTS, KINDS, WEIGHTS, Integers, sequence
from shardwise.splitting.schedule import FORWARD, INPUT, WEIGHT, Action, order
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class Sync:
    """Collectives of `fully_shard` around one action of a stage.

    Attributes:
        blocks: whether the parameters of the blocks are all-gathered.
        root: whether the other parameters of the stage are all-gathered.
        reduces: whether gradients are reduce-scattered.
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


def syncs(strategy: Strategy, actions: Sequence[Action]) -> list[Sync]:
    """Return the collectives of `fully_shard` at each action of a worker.

    With tp or pp, gradients are reduced in the last backward pass of a stage, and the earlier backward passes leave
    the parameters gathered. Otherwise each microbatch reduces its own gradients. See `LocalStages.before_backward` and
    `fsdp.split_parameters`.
    """
    module = strategy.runs_module
    whole: dict[int, bool] = {}
    root: dict[int, bool] = {}
    last = {action.stage: index for index, action in enumerate(actions) if action.kind not in (FORWARD, WEIGHT)}
    found = []
    for index, action in enumerate(actions):
        stage = action.stage
        if action.kind == WEIGHT:
            found.append(Sync(False, False, False))
            continue
        gathers = Sync(not whole.get(stage, False), not root.get(stage, False), False)
        if action.kind == FORWARD:
            whole[stage], root[stage] = strategy.zero != 3, True
            found.append(gathers)
            continue
        final = module or last[stage] == index
        whole[stage] = root[stage] = not final
        found.append(Sync(gathers.blocks, gathers.root, final))
    return found


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
    strategy = _of_order(strategy)
    short, long, times = _shorter(strategy)
    if not times:
        return _turns(strategy, pipeline_rank)
    few, more = _turns(short, pipeline_rank), _turns(long, pipeline_rank)
    if [turn.kind for turn in few] != [turn.kind for turn in more]:
        return _turns(strategy, pipeline_rank)
    return tuple(replace(a, count=a.count + times * (b.count - a.count)) for a, b in zip(few, more, strict=True))


def _of_order(strategy: Strategy) -> Strategy:
    """Return a normalized strategy that is equal for all strategies with the same order of passes, for use as a key."""
    return Strategy(
        fsdp=2 if strategy.splits_parameters else 1,
        zero=strategy.zero if strategy.splits_parameters else 3,
        tp=1 if strategy.runs_module else 2,
        pp=strategy.pp,
        schedule=strategy.schedule,
        stages=strategy.stages,
        microbatches=strategy.microbatches,
    )


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
def _turns(strategy: Strategy, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    kinds, chunks = sequence(strategy, pipeline_rank)
    found: list[EqualPasses] = []
    for chunk in range(strategy.stages_per_worker):
        found += _of_stage(strategy, kinds[chunks == chunk], chunk * strategy.pp + pipeline_rank)
    return tuple(found)


def _of_stage(strategy: Strategy, kinds: Integers, stage: int) -> Iterable[EqualPasses]:
    """Yield the distinct passes of one stage in the order of their first occurrence; see `syncs` and `table`."""
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
    codes = (((((kinds * 2 + gathers) * 2 + rooted) * 2 + first) * 2 + final) * 2) + reduces
    _, positions, counts = np.unique(codes, return_index=True, return_counts=True)
    for which in np.argsort(positions):
        at = positions[which]
        sync = None
        if strategy.splits_parameters:
            sync = Sync(bool(gathers[at]), bool(rooted[at]), bool(reduces[at]))
        action = Action(KINDS[kinds[at]], stage, 0)
        yield EqualPasses(action, sync, bool(final[at]), bool(first[at]), int(counts[which]))


def table(strategy: Strategy, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    """Return all passes of pipeline worker `pipeline_rank` one by one, each with a count of 1, in execution order."""
    return _table(_of_order(strategy), pipeline_rank)


@lru_cache(maxsize=1024)
def _table(strategy: Strategy, pipeline_rank: int) -> tuple[EqualPasses, ...]:
    actions = actions_of(strategy, pipeline_rank)
    shards = syncs(strategy, actions) if strategy.splits_parameters else [None] * len(actions)
    last = {action.stage: index for index, action in enumerate(actions) if action.kind not in (FORWARD, WEIGHT)}
    seen: set[int] = set()
    found = []
    for index, (action, sync) in enumerate(zip(actions, shards, strict=True)):
        first = action.kind != FORWARD and action.stage not in seen
        if action.kind not in (FORWARD, INPUT):
            seen.add(action.stage)
        found.append(EqualPasses(action, sync, last[action.stage] == index, first, 1))
    return tuple(found)


Counts = tuple[tuple[int, int, int], ...]
"""Microbatches in flight: (stage, number with saved activations, number that only wait for weight gradients)."""


def under_way(strategy: Strategy, pipeline_rank: int) -> tuple[Counts, Counts]:
    """Return the microbatches in flight in a worker's first backward pass, and the most in any later one.

    The second is empty if there is only one backward pass.
    """
    strategy = _of_order(strategy)
    short, long, times = _shorter(strategy)
    few, more = _under_way(short, pipeline_rank), _under_way(long, pipeline_rank)
    if not times:
        return few
    if any([each[0] for each in a] != [each[0] for each in b] for a, b in zip(few, more, strict=True)):
        return _under_way(strategy, pipeline_rank)
    first, later = (_extended(less, most, times) for less, most in zip(few, more, strict=True))
    return first, later


def _extended(few: Counts, more: Counts, times: int) -> Counts:
    """Extrapolate counts linearly: `few + times * (more - few)`."""
    pairs = zip(few, more, strict=True)
    return tuple((stage, a + times * (b - a), c + times * (d - c)) for (stage, a, c), (_, b, d) in pairs)


@lru_cache(maxsize=65536)
def _under_way(strategy: Strategy, pipeline_rank: int) -> tuple[Counts, Counts]:
    kinds, chunks = sequence(strategy, pipeline_rank)
    change = np.where(kinds == FORWARDS, 1, np.where((kinds == BACKWARDS) | (kinds == WEIGHTS), -1, 0))
    before = np.cumsum(change) - change
    backward = np.flatnonzero((kinds == BACKWARDS) | (kinds == INPUTS))
    first, others = int(backward[0]), backward[1:]
    most = [first, *([int(others[np.argmax(before[others])])] if len(others) else [])]
    put_off = np.where(kinds == INPUTS, 1, np.where(kinds == WEIGHTS, -1, 0))
    found = [_counts(strategy, pipeline_rank, chunks[:end], change[:end], put_off[:end]) for end in most]
    return found[0], found[1] if len(found) > 1 else ()


def _counts(strategy: Strategy, pipeline_rank: int, chunks: Integers, change: Integers, put_off: Integers) -> Counts:
    both, weights = (np.bincount(chunks, weights=each).astype(int) for each in (change, put_off))
    return tuple(
        (int(chunk) * strategy.pp + pipeline_rank, int(both[chunk] - weights[chunk]), int(weights[chunk]))
        for chunk in np.unique(chunks)
    )
