"""Determine how many ranks send pipeline messages at once, and which links are so slow that cuts should avoid them."""

from __future__ import annotations

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict.hardware.times import collective_seconds
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.groups import message_group
from shardwise.splitting.balance import BYTES_PER_SECOND
from shardwise.splitting.slow_links import link_count, much_slower
from shardwise.strategy import Strategy

SMALL, LARGE = 2**17, 2**20
"""Bytes of two messages whose difference in time gives the seconds per byte of a link, without its latency."""


def workers_at_once(strategy: Strategy, cluster: Cluster, group: Group) -> int:
    """Return the number of ranks that send or receive at the same time as the two ranks of a message.

    Within a node, all ranks of the pipeline send to their neighbours at once. Between two nodes, only the messages
    between two stages cross, one for each copy of the pipeline.
    """
    crosses = group.domains(cluster.node_size) > 1
    return 2 * strategy.replicas * strategy.tp if crosses else strategy.workers


def slower_links(profile: Profile, strategy: Strategy, cluster: Cluster) -> tuple[float, ...]:
    """Return for each pipeline worker how many times slower than assumed its link to the next worker is.

    A link that is not much slower has the factor 1. Returns an empty tuple if all links are like that, or without a
    pipeline. The assumption is `balance.BYTES_PER_SECOND`; see `balance.divided` for the use of the factors.
    """
    if strategy.pp == 1:
        return ()
    axes = tuple(getattr(strategy, axis) for axis in ("dp", "fsdp", "pp", "tp"))
    key = "hops", Same(cluster), axes, strategy.outermost, strategy.stages_per_worker > 1
    return profile.memo.once(key, lambda: _slower(profile, strategy, cluster))


def _slower(profile: Profile, strategy: Strategy, cluster: Cluster) -> tuple[float, ...]:
    seconds = [_per_byte(strategy, cluster, pipeline_rank) for pipeline_rank in range(link_count(strategy))]
    return much_slower(seconds, BYTES_PER_SECOND[profile.device])


def _per_byte(strategy: Strategy, cluster: Cluster, pipeline_rank: int) -> float:
    group = message_group(strategy, pipeline_rank, (pipeline_rank + 1) % strategy.pp)
    workers = workers_at_once(strategy, cluster, group)
    small, large = (collective_seconds(Collective("send", size, group), cluster, workers) for size in (SMALL, LARGE))
    return max(0.0, large - small) / (LARGE - SMALL)
