"""Simpler variants of a strategy: with one option less, or with one axis less over the same workers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import permutations
from typing import Any

from shardwise.errors import StrategyError
from shardwise.options import EQUAL, FULL, NONE, SELECTIVE
from shardwise.planner.search.problem import words
from shardwise.strategy import Strategy

AXES = ("dp", "fsdp", "tp", "pp")

SIMPLER: tuple[Mapping[str, Any], ...] = (
    {"zero": 3},
    {"sp": 0},
    {"microbatches": 0},
    {"schedule": "1f1b", "stages": 0},
    {"stages": 0},
    {"recompute": NONE},
    {"recompute": FULL},
    {"recompute": SELECTIVE},
    {"bucket": 0},
    {"compile": 0},
    {"shares": EQUAL},
    {"speeds": EQUAL},
    {"outermost": "dp"},
)
"""Values with which a strategy has an option less; it is also simpler to recompute all blocks than a part of them."""

NEEDS: Mapping[str, Mapping[str, Any]] = {
    "dp": {"shares": EQUAL, "bucket": 0},
    "fsdp": {"shares": EQUAL, "bucket": 0, "zero": 3},
    "tp": {"sp": 0},
    "pp": {"schedule": "1f1b", "stages": 0, "speeds": EQUAL, "outermost": "dp", "microbatches": 0},
}
"""Axis -> defaults of the options that may be wrong without it."""


def simplifications(strategy: Strategy) -> Iterator[Strategy]:
    """Yield each strategy for equally many workers that is one step simpler.

    It may be impossible for the model, the batch or the user's constraints. Precision and offload stay: the first
    changes what is computed, and the second is used only where nothing else fits.
    """
    for changes in (*SIMPLER, *_axes_joined(strategy)):
        try:
            other = strategy.with_(**changes)
        except StrategyError:
            continue
        if words(other) < words(strategy):
            yield other


def _axes_joined(strategy: Strategy) -> Iterator[Mapping[str, Any]]:
    """Yield the changes that give the workers of one axis to another, for each pair of the strategy's axes."""
    used = [axis for axis in AXES if getattr(strategy, axis) > 1]
    for gone, grown in permutations(used, 2):
        workers = getattr(strategy, gone) * getattr(strategy, grown)
        speeds = {"speeds": EQUAL} if grown == "pp" else {}
        yield {**NEEDS[gone], **speeds, gone: 1, grown: workers}
