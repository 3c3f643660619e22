"""The number of devices up to which more of them pay."""

from __future__ import annotations

from collections.abc import Sequence

WORTH = 0.5
"""Least samples per second that an added device must bring, as a fraction of those of each of the first devices."""


def last_worth(rates: Sequence[tuple[int, float]]) -> int | None:
    """Return the number of devices up to which each added one pays.

    Args:
        rates: (devices, samples per second), fewest devices first; 0 samples per second if nothing fits.
    """
    fitting = [each for each in rates if each[1]]
    if not fitting:
        return None
    found = fitting[0]
    base = found[1] / found[0]
    for workers, rate in fitting[1:]:
        if (rate - found[1]) / (workers - found[0]) < WORTH * base:
            break
        found = workers, rate
    return found[0]
