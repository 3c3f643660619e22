"""How far predictions are from measurements: relative errors, and whether they rank alike."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Sequence

DRAWS = 200
"""How often measurements are drawn anew to tell what rank correlation their scatter allows."""

FEWEST_REPEATS = 5
"""Measurements beyond the first of each thing, below which their scatter is not known well enough for that."""


def mean(values: Sequence[float]) -> float | None:
    """Arithmetic mean; None of nothing."""
    return sum(values) / len(values) if values else None


def percentile(values: Sequence[float], share: float) -> float | None:
    """The value below which that share lies, between neighbours in proportion; None of nothing."""
    if not values:
        return None
    ordered = sorted(values)
    place = share * (len(ordered) - 1)
    low = math.floor(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def ranks(values: Sequence[float]) -> list[float]:
    """Rank of each value from 1; equal values share the mean of their ranks."""
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
    """Spearman's: the correlation of ranks. None for fewer than three pairs or where all of one are equal."""
    if len(a) < 3:
        return None
    x, y = ranks(a), ranks(b)
    middle = (len(a) + 1) / 2
    across = sum((p - middle) * (q - middle) for p, q in zip(x, y, strict=True))
    spread = math.sqrt(sum((p - middle) ** 2 for p in x) * sum((q - middle) ** 2 for q in y))
    return across / spread if spread else None


def place_of_best(measured: Sequence[float], predicted: Sequence[float]) -> int:
    """Which place, from 1, the fastest measured one has among the predictions."""
    best = min(range(len(measured)), key=measured.__getitem__)
    return 1 + sum(1 for value in predicted if value < predicted[best])


def rank_correlation_of_scatter(alike: Sequence[Sequence[float]]) -> float | None:
    """Rank correlation with the measurements that a predictor of the true values is to expect: 1 if they never scatter.

    Args:
        alike: measurements of one thing each, in any unit. Their geometric mean stands for the true value, and around
            it they are log-normal with one spread, that of all repeats together.

    Returns:
        The mean over measurements drawn anew (always the same draws), None where too few things are measured again.
    """
    logarithms = [[math.log(value) for value in values] for values in alike]
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
