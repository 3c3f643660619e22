"""Parallel training that is broken on purpose, to see that the comparison with one process notices."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from equality import Factory, Part, errors, merge, reference, train_part
from pool import Pools

from shardwise.strategy import Strategy

Breaking = Callable[[], AbstractContextManager[Any]]
NOTICED = 1e-3


def part_of_broken(breaking: Breaking, factory: Factory, strategy: str) -> Part:
    """Take three steps on one worker while they are broken; afterwards it is whole again, for it lives on."""
    with breaking():
        return train_part(factory, strategy, 3, False, None)


def assert_noticed(workers: Pools, factory: Factory, strategy: str, breaking: Breaking) -> None:
    """Fails where a broken training passes for a right one."""
    expected = reference(workers, factory, strategy)
    parts = workers(Strategy.parse(strategy).workers, part_of_broken, breaking, factory, strategy)
    try:
        found = errors(merge(parts), expected)
    except AssertionError:
        return  # the workers do not even agree with each other, or gradients are missing
    assert max(error for error, _ in found.values()) > NOTICED, found
