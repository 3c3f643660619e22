"""Cut a chain into consecutive parts of about equal cost."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

Integers = NDArray[np.int64]

HALVINGS = 10
"""Steps of the bisection that looks for a cheap cut before the dynamic programming."""


def balanced(
    costs: Sequence[float],
    sends: Sequence[float],
    parts: int,
    speeds: Sequence[float] = (),
    slower: Sequence[float] = (),
) -> list[int]:
    """Cut a chain of segments into consecutive parts so that the most expensive part is as cheap as possible.

    Dynamic programming over (parts, end), restricted to parts that cost no more than those of a known cut. Among
    equally good cuts the one that sends least is chosen.

    Args:
        costs: cost of each segment of the chain, at least as many as `parts`.
        sends: cost to begin a part at each segment but the first (receiving its input), in the same unit.
        parts: number of parts.
        speeds: speed of the worker of each part, which divides the part's cost. Empty: all are equally fast.
        slower: factor on the cost to begin each part but the first. Empty: 1.

    Returns:
        the first segment of each part but the first.

        >>> balanced([1, 1, 1, 3], [0, 0, 0], 2)
        [3]
        >>> balanced([1, 1, 1, 1], [0, 0, 0], 2, [3, 1])
        [3]
    """
    count = len(costs)
    if parts in (1, count):
        return list(range(1, parts))
    until = np.array(list(accumulate(costs, initial=0.0)))
    entry = np.array([0.0, *sends, 0.0])
    speeds, slower = speeds or [1.0] * parts, [1.0, *(slower or [1.0] * (parts - 1))]
    most = _filled(until, entry, slower, _even(until, entry, parts, slower)) * max(speeds) / min(speeds)
    starts, own = _parts_up_to(until, most)
    worst, sent = until / speeds[0], np.zeros(count + 1)
    choices: list[tuple[int, list[int]]] = []
    for part in range(1, parts):
        band = _ends(until, part, parts, most)
        from_, arrives = starts[band], entry * slower[part]
        cost = np.where(from_ >= part, np.maximum(worst[from_], (own[band] + arrives[from_]) / speeds[part]), np.inf)
        least = cost.min(axis=1)
        sums = sent + arrives
        total = np.where(cost == least[:, None], sums[from_], np.inf)
        choice = from_[np.arange(len(from_)), total.argmin(axis=1)]
        worst, sent = np.full(count + 1, np.inf), np.zeros(count + 1)
        worst[band], sent[band] = least, sums[choice]
        choices.append((band.start, choice.tolist()))
    cuts: list[int] = []
    end = count
    for first, choice in reversed(choices):
        end = choice[end - first]
        cuts.append(end)
    return cuts[::-1]


def _ends(until: Floats, part: int, parts: int, most: float) -> slice:
    """Return the range of possible ends of part `part`, if no part may cost more than `most` or be empty."""
    slack = most * (1 + 1e-9)
    low = np.searchsorted(until, until[-1] - (parts - part - 1) * slack)
    high = np.searchsorted(until, (part + 1) * slack, side="right")
    return slice(max(int(low), part + 1), min(int(high), len(until) - (parts - part - 1)))


def _even(until: Floats, entry: Floats, parts: int, slower: Sequence[float]) -> float:
    """Compute the cost of the most expensive part of a cut into about equal parts.

    The best cut costs at most as much.
    """
    count = len(until) - 1
    shares = np.arange(1, parts) / parts
    by_cost = np.searchsorted(until, shares * until[-1])
    fitting = np.clip(by_cost, np.arange(1, parts), count - parts + np.arange(1, parts))
    fitting = np.maximum.accumulate(fitting - np.arange(parts - 1)) + np.arange(parts - 1)
    bounds = np.concatenate(([0], fitting, [count]))
    return float((np.diff(until[bounds]) + entry[bounds[:-1]] * np.array(slower)).max())


def _filled(until: Floats, entry: Floats, slower: Sequence[float], most: float) -> float:
    """Return a cost below `most`, that of a known cut, if one is found by which parts can be filled one by one.

    Parts begin where that costs least, if there are enough such segments. The less the most expensive part may cost,
    the fewer cuts the dynamic programming has to look at.
    """
    cheap = np.flatnonzero(entry[1:-1] <= entry[1:-1].min()) + 1
    if len(cheap) + 1 >= len(slower):
        points = np.concatenate(([0], cheap, [len(until) - 1]))
        until, entry = until[points], entry[points]
    ends, begins = until.tolist(), entry.tolist()
    low, high = ends[-1] / len(slower), most
    for _ in range(HALVINGS):
        middle = (low + high) / 2
        low, high = (low, middle) if _fits(ends, begins, slower, middle) else (middle, high)
    return high


def _fits(until: Sequence[float], entry: Sequence[float], slower: Sequence[float], most: float) -> bool:
    """Return whether parts that are filled one by one, each up to the cost `most`, hold the whole chain."""
    start, last = 0, len(until) - len(slower)
    for part, factor in enumerate(slower):
        # each later part keeps at least one segment
        start, before = bisect_right(until, until[start] + most - entry[start] * factor, hi=last + part + 1) - 1, start
        if start <= before:
            return False
    return start == len(until) - 1


def _parts_up_to(until: Floats, most: float) -> tuple[Integers, Floats]:
    """Return (start, cost without receiving) of all parts that cost at most `most`, with one row per end.

    A part with end n ends before segment n. Rows are padded at the front with starts of infinite cost.
    """
    count = len(until) - 1
    ends = np.arange(count + 1)
    slack = most * (1 + 1e-9)
    first = np.searchsorted(until, until - slack)
    width = max(1, int((ends - first).max()))
    starts = ends[:, None] - np.arange(width, 0, -1)[None, :]
    fits = starts >= 0
    starts = np.maximum(starts, 0)
    own = until[:, None] - until[starts]
    return starts, np.where(fits & (own <= slack), own, np.inf)
