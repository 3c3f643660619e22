"""Checks of the recipes' parameters: each message says the value and one that would do."""

from __future__ import annotations

from shardwise.errors import WorkloadError


def check_positive(**values: float) -> None:
    """Raises WorkloadError where a value is not above 0."""
    for name, value in values.items():
        if not value > 0:
            raise WorkloadError(f"{name}={value}: must be above 0")


def check_share(**values: float) -> None:
    """Raises WorkloadError where a value is not from 0 to below 1."""
    for name, value in values.items():
        if not 0 <= value < 1:
            raise WorkloadError(f"{name}={value}: must be from 0 to below 1")


def check_divides(name: str, value: int, unit: int, why: str) -> None:
    """Raises WorkloadError where `value` is not a positive multiple of `unit`; `why` says what the unit is."""
    if value < 1 or value % unit:
        below = value // unit * unit
        fitting = f"{below} or {below + unit}" if below > 0 else str(unit)
        raise WorkloadError(f"{name}={value}: use {fitting}, a multiple of {why}")
