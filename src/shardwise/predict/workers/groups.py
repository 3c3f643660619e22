"""Groups of ranks that communicate along an axis of a strategy."""

from __future__ import annotations

from itertools import product

from shardwise.collective import Group
from shardwise.strategy import Strategy


def group_of(strategy: Strategy, axis: str, pipeline_rank: int = 0) -> Group:
    """Return the group of an axis that contains pipeline rank `pipeline_rank` of the first replica.

    Axis `replicas` is that of the replicas that sum gradients: dp and fsdp together, with local steps fsdp alone.
    `world` is all ranks, `together` those that take local steps together.
    """
    first = pipeline_rank * strategy.stride("pp")
    if axis == "world":
        return Group(strategy.workers)
    if axis == "together":
        columns = product(range(strategy.fsdp), range(strategy.pp), range(strategy.tp))
        return Group.of(sorted(strategy.rank(fsdp=column, pp=stage, tp=shard) for column, stage, shard in columns))
    if axis == "tp":
        return Group(strategy.tp, 1, first)
    if axis == "pp":
        return Group(strategy.pp, strategy.stride("pp"))
    if axis == "dp":
        return Group(strategy.dp, strategy.stride("dp"), first)
    return Group(strategy.fsdp if axis == "fsdp" else strategy.summing, strategy.stride("fsdp"), first)


def message_group(strategy: Strategy, source: int, target: int) -> Group:
    """Return the group of the two ranks that exchange a message, from pipeline ranks `source` and `target`."""
    low, high = sorted((source, target))
    return Group(2, (high - low) * strategy.stride("pp"), strategy.rank(pp=low))


def replica_axis(strategy: Strategy) -> str:
    """Return the name of the mesh axis over which replicas sum: `dp` if it has several, else `fsdp`."""
    return "dp" if strategy.summing > strategy.fsdp else "fsdp"
