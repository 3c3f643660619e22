"""Checks of the recipes' parameters; each message states the value and one that is accepted."""

from __future__ import annotations

from shardwise.errors import WorkloadError

MOST = 10_000_000
"""Largest value of a parameter: anything larger is a typo, and would fill the memory before an error is reported."""

DEEPEST = 10_000
"""Largest number of layers in a model, and of heads in a layer."""


def check_positive(**values: float) -> None:
    """Raise WorkloadError if a value is not above 0, or is above `MOST`."""
    for name, value in values.items():
        if not value > 0:
            raise WorkloadError(f"{name}={value}: must be above 0")
        check_at_most(MOST, **{name: value})


def check_at_most(most: int, **values: float) -> None:
    """Raise WorkloadError if a value is above `most`."""
    for name, value in values.items():
        if value > most:
            raise WorkloadError(f"{name}={value}: must be {most} or less")


def check_share(**values: float) -> None:
    """Raise WorkloadError if a value is not from 0 to below 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise WorkloadError(f"{name}={value}: must be from 0 to below 1")


def check_divides(name: str, value: int, unit: int, why: str) -> None:
    """Raise WorkloadError if `value` is not a positive multiple of `unit`; `why` describes the unit."""
    check_at_most(MOST, **{name: value})
    if value < 1 or value % unit:
        below = value // unit * unit
        fitting = f"{below} or {below + unit}" if below > 0 else str(unit)
        raise WorkloadError(f"{name}={value}: use {fitting}, a multiple of {why}")
