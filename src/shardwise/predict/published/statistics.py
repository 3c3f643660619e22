"""Statistics that compare predictions with measurements: means, percentiles and rank correlation."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

DRAWS = 200
"""Number of times that measurements are redrawn to estimate the rank correlation that their scatter allows."""

FEWEST_REPEATS = 5
"""Least number of repeated measurements, beyond the first of each thing, to estimate their scatter from."""


def mean(values: Sequence[float]) -> float | None:
    """Return the arithmetic mean. Returns None if there are no values."""
    return sum(values) / len(values) if values else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """Return the value below which a share of the values lies, interpolated linearly between neighbours.

    Returns None if there are no values.
    """
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ranks(values: Sequence[float]) -> list[float]:
    """Return the rank of each value, from 1; equal values share the mean of their ranks."""
    order = sorted(range(len(values)), key=values.__getitem__)
    result = [0.0] * len(values)
    start = 0
    while start < len(order):
        end = start
        while end + 1 < len(order) and values[order[end + 1]] == values[order[start]]:
            end += 1
        for place in range(start, end + 1):
            result[order[place]] = (start + end) / 2 + 1
        start = end + 1
    return result


def rank_correlation(a: Sequence[float], b: Sequence[float]) -> float | None:
    """Return Spearman's rank correlation.

    Returns None if there are fewer than three pairs, or all values of `a` or of `b` are equal.
    """
    if len(a) < 3:
        return None
    x, y = ranks(a), ranks(b)
    middle = (len(a) + 1) / 2
    across = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    spread = math.sqrt(sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y))
    return across / spread if spread else None


def place_of_best(measured: Sequence[float], predicted: Sequence[float]) -> int:
    """Return the position, from 1, that the fastest measured run has among the predictions."""
    best = min(range(len(measured)), key=measured.__getitem__)
    return 1 + sum(1 for value in predicted if value < predicted[best])


def rank_correlation_of_scatter(groups: Sequence[Sequence[float]]) -> float | None:
    """Estimate the rank correlation with the measurements that a perfect predictor would reach: 1 without scatter.

    Args:
        groups: repeated measurements of one thing each, in any unit. Their geometric mean is taken for the true value,
            around which they are log-normal; one spread is estimated from all repeats together.

    Returns:
        The mean over redrawn measurements (always the same draws). None if there are too few repeated measurements.
    """
    logarithms = [[math.log(value) for value in values] for values in groups]
    repeats = sum(len(values) - 1 for values in logarithms)
    if repeats < FEWEST_REPEATS:
        return None
    means = [statistics.fmean(values) for values in logarithms]
    squares = sum((value - middle) ** 2 for values, middle in zip(logarithms, means, strict=True) for value in values)
    spread = math.sqrt(squares / repeats)
    true = [middle for values, middle in zip(logarithms, means, strict=True) for _ in values]
    draws = random.Random(0)
    found = [rank_correlation(true, [draws.gauss(middle, spread) for middle in true]) for _ in range(DRAWS)]
    return mean([value for value in found if value is not None])
