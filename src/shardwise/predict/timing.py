"""Seconds of the links of a profile on the devices of a cluster, as sums that any range of links is read from at once.

A link's kernels start one after the other as the host launches them (Yu et al. 2021 call it launch-bound where the
device is faster):

    seconds = max(sum of kernel times, launches x launch time)

A CPU computes what it starts, so that both add up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective, Group
from shardwise.predict.kernel import Kernel
from shardwise.predict.kernels import KernelTimes, collective_seconds, launches
from shardwise.predict.profile import Layer, Pass, Profile
from shardwise.strategy import Strategy

DTYPES = {"float32": "float32", "bf16": "bf16"}


@dataclass(frozen=True, slots=True)
class Spent:
    """Seconds of a pass, or of a part of it.

    Attributes:
        kernels: that the device computes.
        exchanges: of tensor parallelism, which are waited for.
        launching: that the host needs to start the kernels.
        inline: whether the device is the host, so that it does not compute meanwhile.
    """

    kernels: float = 0.0
    exchanges: float = 0.0
    launching: float = 0.0
    inline: bool = False

    @property
    def device(self) -> float:
        """What the device needs, if its host is ahead of it."""
        return self.kernels + self.exchanges + (self.launching if self.inline else 0.0)

    @property
    def total(self) -> float:
        """With waiting for the host, which runs ahead of a device where it can."""
        return max(self.device, self.launching)

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            self.kernels + other.kernels,
            self.exchanges + other.exchanges,
            self.launching + other.launching,
            self.inline or other.inline,
        )

    def times(self, count: float) -> Spent:
        """So many of it."""
        return Spent(self.kernels * count, self.exchanges * count, self.launching * count, self.inline)


@dataclass(frozen=True, slots=True)
class Sums:
    """Sums over links 0 to i, one entry more than links.

    Attributes:
        kernels, exchanges, launching, inline: as in `Spent`.
        total: what the device needs, if its host is ahead.
        each: seconds of every link alone, as its program measures it to cut stages.
    """

    kernels: tuple[float, ...]
    exchanges: tuple[float, ...]
    launching: tuple[float, ...]
    inline: bool
    total: tuple[float, ...]
    each: tuple[float, ...]

    @classmethod
    def of(cls, spent: Sequence[Spent]) -> Sums:
        """Of what each link spends."""
        return cls(
            tuple(accumulate((each.kernels for each in spent), initial=0.0)),
            tuple(accumulate((each.exchanges for each in spent), initial=0.0)),
            tuple(accumulate((each.launching for each in spent), initial=0.0)),
            any(each.inline for each in spent),
            tuple(accumulate((each.device for each in spent), initial=0.0)),
            tuple(each.total for each in spent),
        )

    def between(self, first: int, end: int) -> Spent:
        """Links `first` to `end`."""
        return Spent(
            self.kernels[end] - self.kernels[first],
            self.exchanges[end] - self.exchanges[first],
            self.launching[end] - self.launching[first],
            self.inline,
        )


@dataclass(frozen=True, slots=True)
class Timed:
    """The times of a profile's links.

    Attributes:
        cluster: on which.
        device: the slowest of it, which all others wait for.
        kernels: the times of its kernels.
        forward: of the forward pass.
        backward: of the backward pass; of the inputs only, where the profile is split.
        weights: of the weights, where the profile is split.
        recomputed: of each link, where it is the last that is computed again.
        keeps: the last link up to each that the backward pass needs anything of; -1: none does.
        normalised: (link, channels) of batch norms.
    """

    cluster: Cluster
    device: Device
    kernels: KernelTimes
    forward: Sums
    backward: Sums
    weights: Sums
    recomputed: tuple[Spent, ...]
    keeps: tuple[int, ...]
    normalised: tuple[tuple[int, int], ...]

    def again(self, first: int, end: int) -> Spent:
        """What it takes to compute links `first` to `end` again: up to the last tensor that is needed."""
        last = self.keeps[end - 1]
        if last < first:
            return Spent()
        return self.forward.between(first, last) + self.recomputed[last]

    def kernel(self, kernel: Kernel) -> float:
        """Seconds of a kernel on the device."""
        return self.kernels.seconds(kernel)


def slowest(cluster: Cluster, precision: str) -> Device:
    """The device of a cluster that all others wait for, in the dtype of the computation."""
    dtype = DTYPES[precision]
    return min((nodes.device for nodes in cluster.nodes), key=lambda device: device.flops.get(dtype, 0.0))


def timed(profile: Profile, cluster: Cluster, strategy: Strategy, device: Device | None = None) -> Timed:
    """The times of a profile on a cluster; kept for the next strategy that asks for the same.

    Args:
        profile: for the strategy.
        cluster: on which.
        strategy: how many workers there are.
        device: of the cluster; the slowest if left out, which all others wait for.
    """
    workers = min(strategy.workers, cluster.node_size)
    device = device or slowest(cluster, profile.precision)
    crowd = workers if device.shared or device.curves or cluster.collectives else 1
    key = ("timed", id(cluster), id(device), crowd)
    if key not in profile.kept:
        profile.kept[key] = _timed(profile, cluster, device, crowd)
    found = profile.kept[key]
    assert isinstance(found, Timed)
    return found


def _timed(profile: Profile, cluster: Cluster, device: Device, workers: int) -> Timed:
    group = Group(profile.tp)
    kernels = KernelTimes(device, workers)
    exchanges: dict[object, float] = {}

    def of(each: Pass) -> Spent:
        busy = sum(kernels.seconds(kernel) for kernel in each.kernels)
        sent = 0.0
        for exchange in each.exchanges:
            if exchange not in exchanges:
                collective = Collective(exchange.operation, exchange.bytes, group, "tp")
                exchanges[exchange] = collective_seconds(collective, cluster, workers)
            sent += exchanges[exchange]
        return Spent(busy, sent, launches(each.kernels) * device.launch_seconds, device.kind == "cpu")

    spent: dict[int, tuple[Spent, Spent, Spent, Spent]] = {}
    rows = []
    for link in profile.links:
        layer = link.layer
        if id(layer) not in spent:
            spent[id(layer)] = of(layer.forward), of(layer.backward), of(layer.weights), of(layer.recomputed)
        rows.append(spent[id(layer)])
    layers: list[Layer] = [link.layer for link in profile.links]
    keeps = tuple(accumulate((n if layer.keeps else -1 for n, layer in enumerate(layers)), max))
    return Timed(
        cluster,
        device,
        kernels,
        Sums.of([row[0] for row in rows]),
        Sums.of([row[1] for row in rows]),
        Sums.of([row[2] for row in rows]),
        tuple(row[3] for row in rows),
        keeps,
        tuple((number, channels) for number, layer in enumerate(layers) for channels in layer.normalised),
    )
