"""Scale the number of devices: the best plan for each number, and the number above which more devices stop paying."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.errors import RequestError
from shardwise.planner.constraints import Constraints
from shardwise.planner.search.search import SearchResult, search
from shardwise.planner.worth import last_worth
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.simulate import profiles_on
from shardwise.workload.workload import Workload

MOST_DEVICES = 2**19
"""Largest number of devices in the search for the smallest number that fits: a strategy has at most a million."""


_PRICE_SOURCE = re.compile(r"\bprice_per_hour: ([^;]+)")
"""Part of a device's source that says where its price was read, and when."""


@dataclass(frozen=True, slots=True)
class Point:
    """The best plan for a number of devices; `searched.plan.best` is None if nothing fits."""

    workers: int
    searched: SearchResult

    @property
    def rate(self) -> float:
        """Samples per second of the best strategy; 0 if nothing fits."""
        best = self.searched.plan.best
        return best.prediction.samples_per_second if best else 0.0


def counts(first: int, last: int) -> list[int]:
    """Return the numbers of devices to try in a range: its ends and the powers of two between them."""
    powers = [1 << n for n in range(last.bit_length()) if first <= 1 << n <= last]
    return sorted({first, *powers, last})


def scaling(
    workload: Workload,
    cluster: Cluster,
    numbers: Sequence[int],
    constraints: Constraints,
    profiles: ScaledProfiles | None = None,
) -> list[Point]:
    """Search the best plan for each number of devices, sharing profiles. Raises the errors of `search`."""
    profiles = profiles or ScaledProfiles(profiles_on(workload, cluster))
    return [Point(number, search(workload, cluster, number, constraints, profiles)) for number in numbers]


def worth(points: Sequence[Point]) -> Point | None:
    """Return the last point up to which each added device brings `WORTH` of a first device's samples per second.

    Returns None if nothing fits at any point.
    """
    last = last_worth([(point.workers, point.rate) for point in points])
    return next((point for point in points if point.workers == last), None)


def dollars(point: Point, cluster: Cluster) -> float | None:
    """Return the price of a million samples in US dollars. Returns None if nothing fits or a price is unknown."""
    prices = [cluster.device(rank).price_per_hour for rank in range(point.workers)]
    if not point.rate or any(price is None for price in prices):
        return None
    return sum(price for price in prices if price is not None) / 3600 / point.rate * 1e6


def price(point: Point, cluster: Cluster) -> dict[str, Any] | None:
    """Return the price of the devices of a point and of its samples, with its source and date.

    Returns None if nothing fits or a price is unknown.
    """
    samples = dollars(point, cluster)
    if samples is None:
        return None
    devices = {id(device): device for rank in range(point.workers) if (device := cluster.device(rank))}
    sources = [found[1] for each in devices.values() if (found := _PRICE_SOURCE.search(each.source))]
    return {
        "dollars_per_hour": sum(cluster.device(rank).price_per_hour or 0.0 for rank in range(point.workers)),
        "dollars_per_million_samples": samples,
        "source": "; ".join(dict.fromkeys(sources)) or "price_per_hour of the cluster file, which states no date",
    }


def price_words(found: Mapping[str, Any], workers: int) -> str:
    """Say what a plan costs, and where the price comes from."""
    devices = "1 device costs" if workers == 1 else f"{workers:,} devices cost"
    return (
        f"{devices} ${found['dollars_per_hour']:,.2f} an hour ({found['source']}), a million samples "
        f"${found['dollars_per_million_samples']:,.2f}."
    )


def cheapest(points: Sequence[Point], cluster: Cluster) -> Point | None:
    """Return the point whose samples cost least. Returns None if nothing fits at any point.

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
    workload: Workload, cluster: Cluster, above: int, constraints: Constraints, profiles: ScaledProfiles
) -> int | None:
    """Return the smallest number of devices of this kind that fits, `above` times a power of two from 2 on.

    Returns None if none was found up to `MOST_DEVICES`, and up to 64 times `above` times the batch size.
    """
    number = above * 2
    while number <= min(MOST_DEVICES, above * workload.batch_size * 64):
        if search(workload, enlarged(cluster, number), number, constraints, profiles).plan.best is not None:
            return number
        number *= 2
    return None


def enlarged(cluster: Cluster, devices: int) -> Cluster:
    """Return the cluster with enough further nodes of its last kind to have at least `devices` devices.

    The links of a single device are unknown. Messages then take no time, which does not affect whether a plan fits.
    """
    if cluster.size >= devices:
        return cluster
    last = cluster.nodes[-1]
    missing = -(-(devices - cluster.size) // last.devices)
    nodes = (*cluster.nodes[:-1], replace(last, count=last.count + missing))
    outer = (replace(level, span=max(level.span, devices)) for level in cluster.levels[-1:])
    return replace(cluster, nodes=nodes, levels=(*cluster.levels[:-1], *outer))
