"""Bytes that `fully_shard` holds of a stage: gathered parameters and gradients, in a backward pass and between passes.

At each segment of its backward pass:

gathered     the blocks that the step program says (`gathered_blocks`); the root always
gradients    of a pass that reduces them: unsharded for the block in its backward pass, and for the block before
             whose reduce-scatter still runs; shards for all others. Of any other pass: unsharded

In a forward pass with zero=3: the block that computes, and the buffer in which it was gathered, which is kept until the
next gather (torch: `FSDPParamGroup.wait_for_unshard`). A pass that finds all blocks gathered frees them one by one.

Between its passes, while the worker runs those of its other stages: what `passes.Left` says.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import accumulate

from shardwise.predict.profile.profile import Profile
from shardwise.predict.runtime.element_bytes import reduced
from shardwise.predict.workers.holdings import Stage
from shardwise.predict.workers.passes import Left, Sync
from shardwise.predict.workers.step_program import gathered_blocks
from shardwise.strategy import Strategy


@dataclass(frozen=True, slots=True)
class StageMemory:
    """Bytes of one stage.

    Attributes:
        gathered: gathered parameters.
        slices: shards of gradients.
        whole: unsharded gradients, and the buffers of collectives in flight.
        reducing: the same once all gradients of a block are there and are reduced, if they are now; else 0. What its
            backward pass needed for a moment is free by then.
    """

    gathered: int
    slices: int
    whole: int
    reducing: int = 0


def held_at_segments(
    profile: Profile, strategy: Strategy, stage: Stage, sync: Sync, trained: int, *, later: bool
) -> list[StageMemory]:
    """Return the bytes held at each segment of a stage, in the order of the backward pass.

    Args:
        profile: the workload's profile.
        strategy: a strategy that shards parameters.
        stage: one of its stages.
        sync: collectives of `fully_shard` around the pass.
        trained: bytes of all gradient shards of the worker.
        later: whether an earlier backward pass has left gradients.
    """
    blocks = stage.blocks
    gathers = [0 if block.gathered is None else block.gathered.gather for block in blocks]
    reduces = [0 if block.gathered is None else block.gathered.reduce for block in blocks]
    root_gather, root_reduce = (0, 0) if stage.root is None else (stage.root.gather, stage.root.reduce)
    module = strategy.runs_module
    made, added = profile.gathered, profile.reduced  # gradients come in the precision of the gathered parameters
    sent = reduced(profile, strategy)
    gathered_until, reduced_until = (list(accumulate(each, initial=0)) for each in (gathers, reduces))
    key = ("complete", stage.first, stage.end, tuple((block.first, block.end) for block in blocks), module)
    of_root, of_blocks, unsplit = profile.memo.once(key, lambda: _complete(profile, stage, module=module))
    found = []
    done_root = done_block = done_unsplit = 0
    last = len(blocks)
    for segment in reversed(range(stage.first, stage.end)):
        index, inside = stage.block_at(segment)
        if index != last:
            last, done_block = index, 0
        there = gathered_blocks(stage, sync, segment)
        gathered = gathered_until[there.stop] - gathered_until[there.start]
        done, reducing = reduced_until[-1] - reduced_until[index + 1], 0.0
        if not sync.reduces:
            every = reduced_until[-1]
            whole = added * (every + root_reduce if later else min(done + done_block, every) + done_root)
            slices = 0
        else:
            behind = sent * (reduces[index + 1] if index + 1 < len(blocks) else 0)
            whole = made * (done_root + (done_block if inside else 0)) + behind
            if inside and segment == blocks[index].first:
                reducing = made * (done_root + reduces[index]) + max(behind, sent * reduces[index])
                if strategy.summing > strategy.fsdp:  # the slices that replicas of shards all-reduce
                    reducing += sent * reduces[index] / strategy.fsdp
            slices = trained if later else done // strategy.fsdp
        after = round(reducing) + done_unsplit if reducing else 0
        found.append(StageMemory(root_gather + gathered, slices, round(whole) + done_unsplit, after))
        done_root += of_root.get(segment, 0)
        done_block += of_blocks.get(segment, 0)
        done_unsplit += unsplit.get(segment, 0)
    return found


def held_in_forward(profile: Profile, stage: Stage, sync: Sync, *, later: bool) -> list[StageMemory]:
    """Return the bytes held in each block of a forward pass with zero=3; the arguments are as in `held_at_segments`."""
    gathers = [0 if block.gathered is None else block.gathered.gather for block in stage.blocks]
    rest = held_between_passes(profile, 1, stage, Left(blocks=False, root=True, gradients=later, unsharded=later))
    there = gathers if sync.blocks else [sum(gathers[index:]) for index in range(len(gathers))]
    buffers = [round(profile.gathered * size) if sync.blocks else 0 for size in gathers]
    return [
        StageMemory(rest.gathered + size, 0, rest.whole + buffer) for size, buffer in zip(there, buffers, strict=True)
    ]


def held_between_passes(profile: Profile, shards: int, stage: Stage, left: Left) -> StageMemory:
    """Return the bytes that the last pass of a stage has left; sharded gradients are one of `shards` parts."""
    blocks = [block.gathered for block in stage.blocks if block.gathered is not None]
    roots = [] if stage.root is None else [stage.root]
    gathered = sum(each.gather for each in [*(blocks if left.blocks else ()), *(roots if left.root else ())])
    reduced = sum(each.reduce for each in [*blocks, *roots]) if left.gradients else 0
    if left.unsharded:
        return StageMemory(gathered, 0, round(profile.reduced * reduced))
    return StageMemory(gathered, reduced // shards, 0)


def _complete(profile: Profile, stage: Stage, *, module: bool) -> tuple[dict[int, int], ...]:
    """Return mappings from a segment to the bytes of gradients that it completes: of the root, of blocks, unsplit."""
    inside = {index for block in profile.blocks for index in block} if module else set()
    root: dict[int, int] = {}
    blocks: dict[int, int] = {}
    unsplit: dict[int, int] = {}
    for index in profile.within(stage.first, stage.end):
        parameter = profile.parameters[index]
        if not parameter.trained:
            continue
        own = [segment for segment in parameter.segments if stage.first <= segment < stage.end]
        if not module:
            first, last = (stage.block_at(segment)[0] for segment in (min(own), max(own)))
            if first == last:
                inside.add(index)
        where = unsplit if parameter.whole else blocks if index in inside else root
        where[min(own)] = where.get(min(own), 0) + parameter.bytes
    return root, blocks, unsplit
