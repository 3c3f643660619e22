"""Parameters that `fully_shard` cannot spread over all workers: they have fewer rows than there are workers."""

from __future__ import annotations

from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.holdings import is_split, shard_bytes
from shardwise.strategy import Strategy
from shardwise.units import format_bytes

WORTH = 0.05
"""Least bytes that a worker holds beyond an even share, relative to that share, from which a note says so."""


def padding_notes(profile: Profile, strategy: Strategy) -> tuple[str, ...]:
    """Return a note if parameters with few rows, such as stacked weights of experts, leave workers without a part."""
    if not strategy.splits_parameters:
        return ()
    return profile.memo.once(("padding notes", strategy.fsdp), lambda: _notes(profile, strategy))


def _notes(profile: Profile, strategy: Strategy) -> tuple[str, ...]:
    split = [each for each in profile.parameters if is_split(each, strategy)]
    even = sum(each.bytes for each in split) / strategy.fsdp
    few = [each for each in split if each.shape[0] < strategy.fsdp]
    beyond = sum(shard_bytes(each, strategy) - each.bytes / strategy.fsdp for each in few)
    if not few or beyond < WORTH * even:
        return ()
    largest = max(few, key=lambda each: each.bytes)
    others = f" and {len(few) - 1} others have" if len(few) > 1 else " has"
    return (
        f"fsdp={strategy.fsdp} splits parameters by rows: {largest.name} ({largest.shape[0]} rows){others} fewer rows "
        f"than there are workers, so that of all parameters a worker holds up to {format_bytes(even + beyond)} instead "
        f"of {format_bytes(even)}",
    )
