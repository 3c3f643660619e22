"""Checks of the recipes' parameters: each message says the value and one that would do."""

from __future__ import annotations

from shardwise.errors import WorkloadError

MOST = 10_000_000
"""The largest value of a parameter: more is a slip of the hand, and would fill the memory before anything is said."""

DEEPEST = 10_000
"""Layers of a model, and heads of one."""


def check_positive(**values: float) -> None:
    """Raises WorkloadError where a value is not above 0, or above all bounds."""
    for name, value in values.items():
        if not value > 0:
            raise WorkloadError(f"{name}={value}: must be above 0")
        check_at_most(MOST, **{name: value})


def check_at_most(most: int, **values: float) -> None:
    """Raises WorkloadError where a value is above `most`."""
    for name, value in values.items():
        if value > most:
            raise WorkloadError(f"{name}={value}: must be {most} or less")


def check_share(**values: float) -> None:
    """Raises WorkloadError where a value is not from 0 to below 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise WorkloadError(f"{name}={value}: must be from 0 to below 1")


def check_divides(name: str, value: int, unit: int, why: str) -> None:
    """Raises WorkloadError where `value` is not a positive multiple of `unit`; `why` says what the unit is."""
    check_at_most(MOST, **{name: value})
    if value < 1 or value % unit:
        below = value // unit * unit
        fitting = f"{below} or {below + unit}" if below > 0 else str(unit)
        raise WorkloadError(f"{name}={value}: use {fitting}, a multiple of {why}")
