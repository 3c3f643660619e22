"""How many devices are worth having: the best plan for each number of them, and where more stop paying."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shardwise.cluster.cluster import Cluster
from shardwise.errors import RequestError
from shardwise.plan.search import Searched, search
from shardwise.plan.wish import Wish
from shardwise.predict.scaled import ScaledProfiles
from shardwise.predict.simulate import profiles_on
from shardwise.workload.workload import Workload

WORTH = 0.5
"""Of what the first devices do in samples per second, the least that an added one must bring to be worth having."""

MOST_DEVICES = 2**20
"""That are looked at for the smallest number that would do."""


@dataclass(frozen=True, slots=True)
class Point:
    """The best plan for a number of devices; `searched.plan.best` is None where nothing fits."""

    workers: int
    searched: Searched

    @property
    def rate(self) -> float:
        """Samples per second; 0 where nothing fits."""
        best = self.searched.plan.best
        return best.prediction.samples_per_second if best else 0.0


def counts(first: int, last: int) -> list[int]:
    """The numbers of devices that a range is looked at with: its ends and the powers of two between."""
    powers = [1 << n for n in range(last.bit_length()) if first <= 1 << n <= last]
    return sorted({first, *powers, last})


def scaling(workload: Workload, cluster: Cluster, numbers: Sequence[int], wish: Wish) -> list[Point]:
    """The best plan for each number of devices, from the same profiles. Raises as `search` does."""
    profiles = ScaledProfiles(profiles_on(workload, cluster))
    return [Point(number, search(workload, cluster, number, wish, profiles)) for number in numbers]


def worth(points: Sequence[Point]) -> Point | None:
    """The last number of devices up to which each added one brings `WORTH` of what those of the first point do."""
    fitting = [point for point in points if point.rate]
    if not fitting:
        return None
    base = fitting[0].rate / fitting[0].workers
    found = fitting[0]
    for point in fitting[1:]:
        if (point.rate - found.rate) / (point.workers - found.workers) < WORTH * base:
            break
        found = point
    return found


def dollars(point: Point, cluster: Cluster) -> float | None:
    """US dollars of a million samples; None where nothing fits, or a price is not known."""
    prices = [cluster.device(rank).price_per_hour for rank in range(point.workers)]
    if not point.rate or any(price is None for price in prices):
        return None
    return sum(price for price in prices if price is not None) / 3600 / point.rate * 1e6


def cheapest(points: Sequence[Point], cluster: Cluster) -> Point | None:
    """The number of devices whose samples cost least.

    Raises:
        RequestError: the price of a device is not known.
    """
    for nodes in cluster.nodes:
        if nodes.device.price_per_hour is None:
            raise RequestError(
                f"objective=money: the price of {nodes.device.name} is not known: give price_per_hour (US dollars) in "
                "a cluster file"
            )
    priced = [(value, point) for point in points if (value := dollars(point, cluster)) is not None]
    return min(priced, key=lambda entry: entry[0])[1] if priced else None


def smallest_that_fits(
    workload: Workload, cluster: Cluster, above: int, wish: Wish, profiles: ScaledProfiles
) -> int | None:
    """The smallest power-of-two multiple of `above` devices of the same kind that would do; None: none was found."""
    number = above * 2
    while number <= min(MOST_DEVICES, above * workload.batch_size * 64):
        if search(workload, enlarged(cluster, number), number, wish, profiles).plan.best is not None:
            return number
        number *= 2
    return None


def enlarged(cluster: Cluster, devices: int) -> Cluster:
    """The cluster with more of its last kind of nodes, until it has so many devices.

    Of a single device no links are known: messages take no time then, which tells nothing less of what fits.
    """
    if cluster.size >= devices:
        return cluster
    last = cluster.nodes[-1]
    missing = -(-(devices - cluster.size) // last.devices)
    nodes = (*cluster.nodes[:-1], replace(last, count=last.count + missing))
    outer = (replace(level, span=max(level.span, devices)) for level in cluster.levels[-1:])
    return replace(cluster, nodes=nodes, levels=(*cluster.levels[:-1], *outer))
