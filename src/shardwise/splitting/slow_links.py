"""Find the links between pipeline stages that are slow enough for cuts to depend on them."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.strategy import Strategy

MUCH = 4.0
"""Factor by which a link must be slower than assumed to move cut points, so that noise does not move them."""


def much_slower(seconds_per_byte: Sequence[float], bytes_per_second: float) -> tuple[float, ...]:
    """Return how many times slower than assumed each link is; 1 for a link that is not slower by more than `MUCH`.

    Returns an empty tuple if no link is that slow.
    """
    factors = tuple(seconds * bytes_per_second for seconds in seconds_per_byte)
    return tuple(factor if factor > MUCH else 1.0 for factor in factors) if any(f > MUCH for f in factors) else ()


def link_count(strategy: Strategy) -> int:
    """Return the number of worker-to-worker links that a pipeline's messages take.

    The link from the last worker to the first counts too if workers have several stages.
    """
    return strategy.pp if strategy.stages_per_worker > 1 else strategy.pp - 1
