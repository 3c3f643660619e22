"""Recompute a part of the blocks, for strategies that do not fit without recomputation.

Recomputing a block saves memory and costs time, so the fewest blocks that fit are the best.
"""

from __future__ import annotations

from math import ceil

from shardwise.cluster.cluster import Cluster
from shardwise.options import FULL, Recompute
from shardwise.planner.search.memory_bounds import least_memory
from shardwise.predict.closed_form.pipeline_links import slower_links
from shardwise.predict.closed_form.segment_times import slowest, timed
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.predict.workers.cuts import cuts_of, stage_blocks
from shardwise.strategy import Strategy

GUESSES = 4
"""Interpolated guesses of the number of blocks before the search continues by bisection."""


def may_be(profile: ProfileSummary, strategy: Strategy) -> bool:
    """Return whether stages have several blocks each, so that a part of them can be recomputed."""
    if strategy.runs_module:
        return profile.repeated > 0
    return profile.narrow + 1 >= 2 * strategy.pp * strategy.stages_per_worker


def fewest(
    profile: Profile, summary: ProfileSummary, strategy: Strategy, cluster: Cluster, room: int
) -> Strategy | None:
    """Return the strategy with the fewest recomputed blocks that fit by their bounds. Returns None if no part fits.

    The bounds are those of `memory_bounds`; a prediction may need more blocks, see `enough`.
    """
    saved, device = _saved(profile, strategy, cluster), slowest(cluster, profile.precision)
    for count in range(1, len(saved)):
        again = _with(strategy, count, len(saved))
        if least_memory(summary, again, device, saved[count]) <= room:
            return again
    return None


def enough(profile: Profile, strategy: Strategy, cluster: Cluster, room: int) -> Strategy | None:
    """Return the first strategy that fits as predicted, with at least as many recomputed blocks as this one.

    Returns None if no part of the blocks is enough. Blocks free similar amounts of memory, so the number is
    interpolated between two predictions.
    """
    blocks = len(_saved(profile, strategy, cluster))
    low, high = strategy.recomputed_of(blocks), blocks - 1

    def missing(count: int) -> int:
        return costs_of(profile, _with(strategy, count, blocks), cluster).memory.total - room

    if low > high or (least := missing(high)) > 0:
        return None
    if low == high or (most := missing(low)) <= 0:
        return _with(strategy, low, blocks)
    tries = 0
    while high - low > 1:  # `low` does not fit, `high` does
        tries += 1
        guess = low + ceil((high - low) * most / (most - least)) if tries < GUESSES else (low + high) // 2
        count = min(max(guess, low + 1), high - 1)
        found = missing(count)
        if found > 0:
            low, most = count, found
        else:
            high, least = count, found
    return _with(strategy, high, blocks)


def _with(strategy: Strategy, count: int, blocks: int) -> Strategy:
    return strategy.with_(recompute=Recompute.part(count, blocks))


def _saved(profile: Profile, strategy: Strategy, cluster: Cluster) -> list[int]:
    """Return the bytes that all stages together save per microbatch with 0, 1, 2 ... recomputed blocks per stage.

    The list has one entry for each block of the stage with most blocks; recomputing all blocks is left out.
    """
    costs = timed(profile, cluster, strategy).forward.each
    module = strategy.runs_module
    slower = slower_links(profile, strategy, cluster)
    key = ("partly", costs, module, strategy.pp, strategy.stages_per_worker, strategy.schedule, slower)
    return profile.memo.once(key, lambda: _saved_of(profile, strategy, costs, slower))


def _saved_of(profile: Profile, strategy: Strategy, costs: tuple[float, ...], slower: tuple[float, ...]) -> list[int]:
    if not profile.cut:
        return []
    saved = profile.saved
    cuts = cuts_of(profile, strategy.with_(recompute=FULL), costs, slower)
    ends = [*(starts[0] for starts in cuts[1:]), len(profile.segments)]
    stages = [
        [saved[last] - saved[first] for first, last in stage_blocks(profile, strategy, starts, end)]
        for starts, end in zip(cuts, ends, strict=True)
    ]
    most = max(map(len, stages))
    dropped = [0] * most
    for blocks in stages:
        # a stage with fewer blocks recomputes the same fraction of them as the largest stage, rounded up
        for count in range(1, most):
            dropped[count] += sum(blocks[: -(-count * len(blocks) // most)])
    return [saved[-1] - each for each in dropped]
