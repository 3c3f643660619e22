"""Groups of ranks that communicate along an axis of a strategy."""

from __future__ import annotations

from shardwise.collective import Group
from shardwise.strategy import Strategy


def group_of(strategy: Strategy, axis: str, pipeline_rank: int = 0) -> Group:
    """Return the group of an axis that contains pipeline rank `pipeline_rank` of the first replica.

    Axis `replicas` is dp and fsdp together, `world` all ranks.
    """
    first = pipeline_rank * strategy.stride("pp")
    if axis == "world":
        return Group(strategy.workers)
    if axis == "tp":
        return Group(strategy.tp, 1, first)
    if axis == "pp":
        return Group(strategy.pp, strategy.stride("pp"))
    if axis == "dp":
        return Group(strategy.dp, strategy.stride("dp"), first)
    return Group(strategy.fsdp if axis == "fsdp" else strategy.replicas, strategy.stride("fsdp"), first)


def message_group(strategy: Strategy, source: int, target: int) -> Group:
    """Return the group of the two ranks that exchange a message, from pipeline ranks `source` and `target`."""
    low, high = sorted((source, target))
    return Group(2, (high - low) * strategy.stride("pp"), strategy.rank(pp=low))


def replica_axis(strategy: Strategy) -> str:
    """Return the name of the mesh axis over which replicas communicate: `dp` if there are several, else `fsdp`."""
    return "dp" if strategy.dp > 1 else "fsdp"
