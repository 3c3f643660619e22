"""Messages between the workers of a pipeline: how many there are at once, and which links are slow enough to cut by."""

from __future__ import annotations

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.parallel.messages import hops_of, much_slower
from shardwise.parallel.planning import BYTES_PER_SECOND
from shardwise.predict.kernels import collective_seconds
from shardwise.predict.parts import message_group
from shardwise.predict.profile import Profile
from shardwise.strategy import Strategy

SMALL, LARGE = 2**17, 2**20
"""Bytes of two messages: what the larger one takes longer is by how much it is larger."""


def workers_at_once(strategy: Strategy, cluster: Cluster, group: Group) -> int:
    """Workers that send, or are sent to, at the same time as those of a message.

    Within a node all neighbours of a pipeline send at the same time. Of those only some are in different nodes: what
    crosses from one node to another are the messages of two stages, one for each copy of the pipeline.
    """
    crosses = len({rank // cluster.node_size for rank in group.ranks}) > 1
    return 2 * strategy.replicas * strategy.tp if crosses else strategy.workers


def slower_hops(profile: Profile, strategy: Strategy, cluster: Cluster) -> tuple[float, ...]:
    """How many times slower than assumed messages are from each worker to the next; see `planning.divided`."""
    if strategy.pp == 1:
        return ()
    axes = tuple(getattr(strategy, axis) for axis in ("dp", "fsdp", "pp", "tp"))
    key = "hops", id(cluster), axes, strategy.outermost, strategy.stages_per_worker > 1
    return profile.kept.once(key, lambda: _slower(profile, strategy, cluster), cluster)


def _slower(profile: Profile, strategy: Strategy, cluster: Cluster) -> tuple[float, ...]:
    seconds = [_per_byte(strategy, cluster, place) for place in range(hops_of(strategy))]
    return much_slower(seconds, BYTES_PER_SECOND[profile.device])


def _per_byte(strategy: Strategy, cluster: Cluster, place: int) -> float:
    group = message_group(strategy, place, (place + 1) % strategy.pp)
    workers = workers_at_once(strategy, cluster, group)
    small, large = (collective_seconds(Collective("send", size, group), cluster, workers) for size in (SMALL, LARGE))
    return max(0.0, large - small) / (LARGE - SMALL)
