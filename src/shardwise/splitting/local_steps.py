"""Rules of local steps: which parameters are averaged together, and after which steps.

Replicas along `dp` take `local` steps each by itself, and average their parameters (local SGD; Stich 2019). With
several fragments each part of the parameters has its own turn, `local / fragments` steps after the one before it, so
that no message is larger than a fragment (Streaming DiLoCo; Douillard et al. 2025).

    local=4, fragments=2     after step 2: fragment 0    after step 4: fragment 1    after step 6: fragment 0    ...
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

MOMENTUM = 0.9
"""Momentum of the outer optimizer (Douillard et al. 2023, DiLoCo, section 3)."""

LEARNING_RATE = 0.7
"""Learning rate of the outer optimizer (Douillard et al. 2023, DiLoCo, section 3)."""


def cut_fragments(sizes: Sequence[int], count: int) -> list[range]:
    """Cut tensors of these sizes into `count` consecutive fragments of about equal size.

    Some are empty only if there are fewer tensors.

    >>> cut_fragments([4, 1, 1, 2], 2)
    [range(0, 1), range(1, 4)]
    """
    whole, ends = sum(sizes), list(accumulate(sizes))
    found, start = [], 0
    for number in range(1, count + 1):
        wanted, most = whole * number / count, len(sizes) - (count - number)
        end = start
        while end < most and (end == start or number == count or ends[end] - sizes[end] / 2 < wanted):
            end += 1
        found.append(range(start, end))
        start = end
    return found


def averaged_after(steps: int, local: int, fragments: int) -> int | None:
    """Return the number of the fragment whose average begins after so many completed steps; None if none does.

    >>> [averaged_after(steps, 4, 2) for steps in range(1, 7)]
    [None, 0, None, 1, None, 0]
    """
    every = local // fragments
    return None if steps % every else (steps // every - 1) % fragments
