"""Activations that a stage keeps of a microbatch, and the messages it sends to other stages."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from shardwise.predict.profile.profile import Profile, Value
from shardwise.predict.workers.buckets import Block

Messages = tuple[tuple[int, tuple[int, ...]], ...]


def boundary_values(
    profile: Profile, number: int, bounds: Sequence[int], stage_of: Sequence[int]
) -> tuple[Messages, Messages, int, int]:
    """Return (sent, returned, received, saved) of a stage for one microbatch; see the attributes of `Stage`."""
    first, end = bounds[number], bounds[number + 1]
    sent: dict[int, list[int]] = {}
    returned: dict[int, list[int]] = {}
    received = 0
    saved = profile.saved[end] - profile.saved[first]
    for value in profile.crossing(first, end):
        if first <= value.made < end:
            targets = sorted({stage_of[segment] for segment in value.used if segment >= end})
            for target in targets:
                sent.setdefault(target, []).append(value.message)
            if profile.runtime.keeps_outputs and not any(first <= segment < end for segment in value.saved[:1]):
                saved += value.held  # an output is held until its gradient arrives
        elif value.made >= 0:
            arrived = value.held if profile.runtime.scatter_pipeline else value.message  # whose parts are gathered
            received += arrived
            saved += arrived if not first <= (value.saved or (-1,))[0] < end else 0
            if value.grad:
                returned.setdefault(stage_of[value.made], []).append(value.message)
        elif any(first <= segment < end for segment in value.saved):
            saved += value.held if not first <= value.saved[0] < end else 0
    flat = [tuple((stage, tuple(sizes)) for stage, sizes in sorted(found.items())) for found in (sent, returned)]
    return flat[0], flat[1], received, saved


def saved_between_blocks(profile: Profile, again: Sequence[Block], first: int, end: int) -> list[tuple[int, int]]:
    """Return (segment, bytes) of the stage's own values that stay although its recomputed blocks `again` save nothing.

    A value stays until the backward pass of that segment. It is either an input of a recomputed block from another part
    of the stage, or a value that a recomputed block saves first and a part that is not recomputed saves too. Values
    that a part that is not recomputed saves first are counted there.
    """
    block_of = {segment: block for block in again for segment in range(block.first, block.end)}
    bounds = {bound for block in again for bound in (block.first, block.end) if first < bound < end}
    passing = {id(value): value for bound in bounds for value in profile.live[bound] if value.made >= first}
    sizes: dict[int, int] = {}
    for value in passing.values():
        until = _needed_until(value, block_of, end)
        if until is not None:
            sizes[until] = sizes.get(until, 0) + value.held
    return sorted(sizes.items())


def _needed_until(value: Value, block_of: Mapping[int, Block], end: int) -> int | None:
    """Return the segment whose backward pass is the last to need a value.

    Returns None if the value is not held beside what parts save: a part that is not recomputed saves it first, or no
    such part saves it and no recomputed block uses it other than the one that made it.
    """
    saved = [segment for segment in value.saved if segment < end]
    if saved and saved[0] not in block_of:
        return None
    made = block_of.get(value.made)
    entered = [block for segment in value.used if segment < end and (block := block_of.get(segment, made)) is not made]
    found = [block.first for block in entered if block is not None] + [
        segment for segment in saved if segment not in block_of
    ]
    return min(found, default=None)
