"""Stages that are alike: of a deep model most of them are, and what one of them needs the others need too."""

from __future__ import annotations

from collections.abc import Callable

from shardwise.predict.parts import Stage
from shardwise.predict.profile import Profile


def alike(profile: Profile, stage: Stage) -> int:
    """A number that stages share which differ in nothing but in where they lie.

    Their links keep and complete the same, and what arrives, what stays, blocks and buckets are equal.
    """
    return _number(profile, "alike", stage, _described)


def gathered_alike(profile: Profile, stage: Stage) -> int:
    """The same of stages whose links and gathered blocks are equal, whatever is computed again."""
    return _number(profile, "gathered alike", stage, _gathered)


def _number(profile: Profile, name: str, stage: Stage, described: Callable[[Profile, Stage], object]) -> int:
    def number() -> int:
        known: dict[object, int] = profile.kept.once((name,), dict)
        return known.setdefault(described(profile, stage), len(known))

    return profile.kept.once((name, id(stage)), number, stage)


def _described(profile: Profile, stage: Stage) -> object:
    first = stage.first
    return (
        _gathered(profile, stage),
        tuple(block.recomputed for block in stage.blocks),
        tuple((bucket.bytes, bucket.ready - first) for bucket in stage.buckets),
        stage.received,
        stage.kept,
        tuple((link - first, size) for link, size in stage.handed),
    )


def _gathered(profile: Profile, stage: Stage) -> object:
    first = stage.first
    blocks = tuple((block.first - first, block.end - first, block.gathered) for block in stage.blocks)
    return profile.kinds_of_links[first : stage.end], blocks, stage.root
