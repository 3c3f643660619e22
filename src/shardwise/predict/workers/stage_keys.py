"""Number pipeline stages so that equal stages share a number, and with it every cached result.

Most stages of a deep model are equal, so that what is computed for one of them holds for all.
"""

from __future__ import annotations

from collections.abc import Callable

from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.holdings import Stage


def stage_key(profile: Profile, stage: Stage) -> int:
    """Return a number that two stages of the profile share if they differ only in their position in the model.

    Such stages have equal segments, blocks and gradient buckets, receive the same number of bytes, and keep the same
    number of bytes per microbatch.
    """
    return _number(profile, "stage", stage, _described)


def gathered_stage_key(profile: Profile, stage: Stage) -> int:
    """Return a number that two stages share if their segments and gathered blocks are equal, recomputed or not."""
    return _number(profile, "gathered stage", stage, _gathered)


def _number(profile: Profile, name: str, stage: Stage, described: Callable[[Profile, Stage], object]) -> int:
    def number() -> int:
        known: dict[object, int] = profile.memo.once((name,), dict)
        return known.setdefault(described(profile, stage), len(known))

    return profile.memo.once((name, Same(stage)), number)


def _described(profile: Profile, stage: Stage) -> object:
    first = stage.first
    return (
        _gathered(profile, stage),
        tuple(block.recomputed for block in stage.blocks),
        tuple((bucket.bytes, bucket.ready - first, bucket.shapes) for bucket in stage.buckets),
        stage.received,
        stage.saved,
        tuple((segment - first, size) for segment, size in stage.handed),
    )


def _gathered(profile: Profile, stage: Stage) -> object:
    first = stage.first
    blocks = tuple((block.first - first, block.end - first, block.gathered) for block in stage.blocks)
    return profile.kinds_of_segments[first : stage.end], blocks, stage.root
