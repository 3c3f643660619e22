"""Cut a profile into pipeline stages and blocks."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise

from shardwise.errors import StrategyError
from shardwise.predict.profile.profile import Profile, module_blocks
from shardwise.splitting.balance import blocks_from, check_stages, cuts_blocks, recomputable, stage_starts
from shardwise.strategy import Strategy


def cuts_of(
    profile: Profile, strategy: Strategy, costs: tuple[float, ...], slower: tuple[float, ...] = ()
) -> tuple[tuple[int, ...], ...]:
    """Return the segments at which the blocks of each stage begin; `costs` and `slower` as in `parts_of`.

    Raises:
        StrategyError: there are more stages than segments. tp leaves fewer segments than one worker has.
    """
    if strategy.runs_module:
        return (tuple(_module_cuts(profile, strategy)),)
    key = "cuts", costs, strategy.pp, strategy.stages_per_worker, cuts_blocks(strategy), strategy.speeds, slower
    return profile.memo.once(key, lambda: tuple(map(tuple, _graph_cuts(profile, strategy, costs, slower))))


def _graph_cuts(
    profile: Profile, strategy: Strategy, costs: tuple[float, ...], slower: tuple[float, ...]
) -> list[list[int]]:
    """Cut stages and their blocks as `balance.divided` does; the cached stages do not depend on the blocks."""
    check_stages(strategy, len(profile.segments) - 1)
    stages, messages = strategy.pp * strategy.stages_per_worker, [segment.message for segment in profile.segments[1:]]
    if profile.runtime.stages != "cost":
        bounds = [*block_starts(profile, stages), len(profile.segments)]
        inside = {bound for block in module_blocks(profile) for bound in block} if cuts_blocks(strategy) else set()
        return [[a, *sorted(bound for bound in inside if a < bound < b)] for a, b in pairwise(bounds)]
    key = "stages", costs, stages, strategy.speeds, slower
    starts = profile.memo.once(
        key, lambda: stage_starts(costs, messages, stages, profile.device, strategy.stage_speeds, slower)
    )
    return blocks_from(costs, messages, starts, in_blocks=cuts_blocks(strategy))


def block_starts(profile: Profile, stages: int) -> list[int]:
    """Return the segment at which each stage begins in software that cuts between blocks, not by their cost.

    With `Runtime.stages` = `number` every stage has as many blocks; where they do not divide evenly, the ends count as
    blocks (Megatron-LM). With `matrices` a stage ends with the block whose parameters reach the stage's share of those
    of blocks and output (nanotron, `get_block_compute_costs`).
    """
    blocks = [first for first, _ in module_blocks(profile)]
    if stages > len(blocks) + 2:
        raise StrategyError(f"{len(blocks)} blocks are too few for {stages} stages of {profile.runtime.name}")
    counts = _by_matrices(profile, stages) if profile.runtime.stages == "matrices" else _by_number(len(blocks), stages)
    befores = list(accumulate(counts[:-1], initial=0))
    return [0, *(blocks[before] if before < len(blocks) else len(profile.segments) - 1 for before in befores[1:])]


def _by_number(blocks: int, stages: int) -> list[int]:
    each, rest = divmod(blocks, stages)
    if rest and (blocks + 2) % stages == 0:
        each = (blocks + 2) // stages
        return [each - (stage in (0, stages - 1)) for stage in range(stages)]
    return [each + (stage < rest) for stage in range(stages)]


def _by_matrices(profile: Profile, stages: int) -> list[int]:
    own = [sum(profile.parameters[index].elements for index in block) for block in profile.blocks]
    last = [
        profile.parameters[index].elements for index in profile.within(len(profile.segments) - 1, len(profile.segments))
    ]
    total, each = sum(own) + max(last, default=0), own[0]
    ends = [min(len(own), -(-total * (stage + 1) // (stages * each))) for stage in range(stages)]
    return [end - start for start, end in pairwise([0, *ends[:-1], len(own)])]


def _module_cuts(profile: Profile, strategy: Strategy) -> list[int]:
    """Return the segments at which the module's repeated blocks, and the parts between them, begin."""
    if not cuts_blocks(strategy):
        return [0]
    bounds = {0}
    for first, end in module_blocks(profile):
        bounds |= {first, end}
    return sorted(bounds - {len(profile.segments)})


def stage_blocks(profile: Profile, strategy: Strategy, starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Return the segment ranges (first, end) of a stage's blocks that recomputation may take, in its order.

    Args:
        profile: the workload's profile.
        strategy: the strategy; its number of microbatches does not matter.
        starts: segments at which the stage's blocks begin, see `cuts_of`.
        end: end of the stage's segments.
    """
    if strategy.runs_module:
        return module_blocks(profile)
    if profile.runtime.stages != "cost":  # the ends are no blocks
        return [block for block in module_blocks(profile) if starts[0] <= block[0] < end]
    found = list(pairwise([*starts, end]))
    return found[: recomputable(strategy, len(found), last=end == len(profile.segments))]


def recomputed_segments(profile: Profile, strategy: Strategy, starts: Sequence[int], end: int) -> list[tuple[int, int]]:
    """Return the ranges of `stage_blocks` that are recomputed.

    A module that could not be traced has a single segment, which contains all blocks: it is recomputed once.
    """
    blocks = stage_blocks(profile, strategy, starts, end)
    count = strategy.recomputed_of(len(blocks))
    return blocks[: count if profile.cut else min(count, 1)]
