"""Compute the seconds of one collective, one pipeline message and one copy kernel under a strategy on a cluster."""

from __future__ import annotations

from collections.abc import Iterable

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict.hardware.times import collective_seconds
from shardwise.predict.hops import workers_at_once
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Profile
from shardwise.predict.timing import Timed
from shardwise.predict.workers.groups import message_group
from shardwise.strategy import Strategy


class Calls:
    """Seconds of collectives, pipeline messages and copies, cached.

    Args:
        profile, strategy, cluster: what is predicted.
        times: seconds of the profile's segments on the device.
    """

    def __init__(self, profile: Profile, strategy: Strategy, cluster: Cluster, times: Timed) -> None:
        self.profile, self.strategy, self.cluster, self.times = profile, strategy, cluster, times
        self._moved: dict[tuple[float, float, int], float] = {}

    def collective(self, operation: str, size: int, group: Group, workers: int = 0) -> float:
        """Return the seconds of one collective, cached with the profile.

        Args:
            operation: one of `collective.OPERATIONS`.
            size: bytes of the message, as `collective.Collective` counts them.
            group: ranks that take part; a group of one rank takes no time.
            workers: ranks that communicate at the same time; 0 if all do.
        """
        if group.size <= 1:
            return 0.0
        crowd = (workers or self.strategy.workers) if self.cluster.collectives else 0
        key = ("collective", id(self.cluster), operation, size, group, crowd)
        collective = Collective(operation, size, group)
        return self.profile.kept.once(key, lambda: collective_seconds(collective, self.cluster, crowd), self.cluster)

    def moved(self, elements: float, size: float, count: int) -> float:
        """Return the seconds of `count` copy kernels that together move `elements` elements and `size` bytes."""
        if count < 1 or elements < 1:
            return 0.0
        key = elements, size, count
        if key not in self._moved:
            self._moved[key] = self._copied(elements, size, count)
        return self._moved[key]

    def _copied(self, elements: float, size: float, count: int) -> float:
        kernel = Kernel("copy", "memory", "float32", 0.0, size / count, (max(1, round(elements / count)),), count=count)
        return self.times.kernel(kernel)

    def message(self, source: int, target: int, sizes: Iterable[int]) -> float:
        """Return the seconds of messages sent one after another between two stages; 0.0 if one rank holds both."""
        strategy = self.strategy
        source, target = source % strategy.pp, target % strategy.pp
        if source == target:
            return 0.0
        group = message_group(strategy, source, target)
        workers = workers_at_once(strategy, self.cluster, group) if self.cluster.collectives else 0
        return sum(self.collective("send", size, group, workers) for size in sizes)
