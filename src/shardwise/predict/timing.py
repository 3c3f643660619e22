"""Seconds of the links of a profile on the devices of a cluster, as sums that any range of links is read from at once.

A link's kernels start one after the other as the host launches them (Yu et al. 2021 call it launch-bound where the
device is faster):

    seconds = max(sum of kernel times, launches x launch time)

A CPU computes what it starts, so that both add up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective, Group
from shardwise.predict.kernel import Kernel
from shardwise.predict.kernels import KernelTimes, collective_seconds, launches
from shardwise.predict.profile import Exchanged, Layer, Pass, Profile
from shardwise.strategy import Strategy

DTYPES = {"float32": "float32", "bf16": "bf16"}

WATCHED_SECONDS = 4e-5
"""Assumed where no host was measured: what one needs for each kernel of a block that keeps the results of its products
(`parallel.selective`), in both passes together; 37 microseconds on a core of an EPYC of 2024."""


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
        repeated: of the forward pass, where it is computed again.
        recomputed: the same of each link, where it is the last that is computed again.
        rest, recomputed_rest: the same two where the results of products are kept.
        keeps: the last link up to each that the backward pass needs anything of; -1: none does.
        normalised: (link, channels) of batch norms.
        crowded: how much longer the host needs where workers wait for cores.
    """

    cluster: Cluster
    device: Device
    kernels: KernelTimes
    forward: Sums
    backward: Sums
    weights: Sums
    repeated: Sums
    recomputed: tuple[Spent, ...]
    rest: Sums
    recomputed_rest: tuple[Spent, ...]
    keeps: tuple[int, ...]
    normalised: tuple[tuple[int, int], ...]
    crowded: float = 1.0

    def overhead(self, what: str, count: int = 1) -> Spent:
        """What the host needs beside kernels, see `cluster.Device.overheads`."""
        seconds = self.device.overheads.get(what, 0.0) * count * self.crowded
        return Spent(launching=seconds, inline=self.device.kind == "cpu")

    @property
    def crowding(self) -> float:
        """Seconds for each step where workers outnumber cores, as far as they do."""
        return self.device.overheads.get("crowded", 0.0) * (self.crowded - 1.0)

    def again(self, first: int, end: int, *, products: bool = False) -> Spent:
        """What it takes to compute links `first` to `end` again: up to the last tensor that is needed.

        `products`: their results are kept.
        """
        last = self.keeps[end - 1]
        if last < first:
            return Spent()
        if products:
            return self.rest.between(first, last) + self.recomputed_rest[last]
        return self.repeated.between(first, last) + self.recomputed[last]

    def kernel(self, kernel: Kernel) -> float:
        """Seconds of a kernel on the device."""
        return self.kernels.seconds(kernel)


def slowest(cluster: Cluster, precision: str) -> Device:
    """The device of a cluster that all others wait for, in the dtype of the computation."""
    dtype = DTYPES[precision]
    return min((nodes.device for nodes in cluster.nodes), key=lambda device: device.flops.get(dtype, 0.0))


@dataclass(frozen=True)
class Seconds:
    """Of passes on a device of a cluster.

    Attributes:
        cluster: on which.
        device: of it.
        tp: tensor-parallel workers.
        crowd: workers of a host that communicate at the same time.
        busy: workers of a host that compute at the same time: fewer in a pipeline, whose workers take turns to wait.
        exchanges: the times of exchanges, as far as they have been asked for.
    """

    cluster: Cluster
    device: Device
    tp: int
    crowd: int
    busy: float
    exchanges: dict[Exchanged, float] = field(default_factory=dict)

    @classmethod
    def on(cls, cluster: Cluster, strategy: Strategy, tp: int, precision: str, device: Device | None = None) -> Seconds:
        """Of a strategy's workers; `device`: of the cluster, the slowest if left out, which all others wait for."""
        workers = min(strategy.workers, cluster.node_size)
        device = device or slowest(cluster, precision)
        crowd = workers if device.shared or device.curves or cluster.collectives else 1
        return cls(cluster, device, tp, crowd, _busy(crowd, device, strategy))

    @cached_property
    def kernels(self) -> KernelTimes:
        """The times of kernels; only made where something is not kept by `key` already."""
        return KernelTimes(self.device, self.busy)

    @property
    def key(self) -> tuple[object, ...]:
        """What they are for, to keep what is made of them."""
        return "timed", id(self.cluster), id(self.device), self.crowd, self.busy

    @property
    def crowded(self) -> float:
        """How much longer the host needs where workers wait for cores."""
        device = self.device
        return max(1.0, self.busy / device.cores) if device.kind == "cpu" and device.cores else 1.0

    def of(self, each: Pass) -> Spent:
        """One pass through a layer."""
        busy = sum(self.kernels.seconds(kernel) for kernel in each.kernels)
        sent = sum(map(self._exchange, each.exchanges))
        host = launches(each.kernels) * self.device.launch_seconds
        host += len(each.exchanges) * self.device.overheads.get("exchange", 0.0)
        return Spent(busy, sent, host * self.crowded, self.device.kind == "cpu")

    def of_layer(self, layer: Layer) -> tuple[Spent, Spent, Spent]:
        """Its forward and backward pass, and those of the weights."""
        return self.of(layer.forward), self.of(layer.backward), self.of(layer.weights)

    def again(self, each: Pass, *, products: bool = False) -> Spent:
        """Computing a pass again; `products`: but for these, whose results are kept."""
        overheads = self.device.overheads
        host = overheads.get("again", 0.0) + (overheads.get("selective", WATCHED_SECONDS) if products else 0.0)
        watched = Spent(launching=host * launches(each.kernels) * self.crowded, inline=self.device.kind == "cpu")
        return self.of(each.rest if products else each) + watched

    def _exchange(self, exchange: Exchanged) -> float:
        if exchange not in self.exchanges:
            collective = Collective(exchange.operation, exchange.bytes, Group(self.tp), "tp")
            self.exchanges[exchange] = collective_seconds(collective, self.cluster, self.crowd)
        return self.exchanges[exchange]


def _busy(workers: int, device: Device, strategy: Strategy) -> float:
    """How many of a host's workers compute at the same time: where they outnumber its cores, those that wait in a
    pipeline leave theirs to others.
    """
    if device.kind != "cpu" or strategy.pp == 1 or workers <= device.cores:
        return workers
    places = max(1, min(strategy.pp, workers // strategy.stride("pp")))
    passes = max(strategy.microbatches, 1) * strategy.stages_per_worker
    if strategy.schedule == "zero-bubble":  # begins and ends with passes of a third, and waits for no more than those
        passes *= 3
    return device.cores * _dilation(strategy.pp, places, passes, workers / places / device.cores)


@lru_cache(maxsize=4096)
def _dilation(pp: int, places: int, passes: int, share: float) -> float:
    """How much longer the turns of a pipeline take on average where workers wait for cores.

    In turn t the workers at the places from t - passes + 1 to t compute (Narayanan et al. 2021, figure 3), and a turn
    takes as long as the host with most of them needs.

    Args:
        pp: places.
        places: of them that a host has, one behind the other.
        passes: of each place, one after the other.
        share: of a host's cores that the workers at one place would use.
    """
    turns = range(passes + pp - 1)
    hosts = [range(first, min(first + places, pp)) for first in range(0, pp, places)]
    most = (max(sum(place <= turn < place + passes for place in host) for host in hosts) for turn in turns)
    return sum(max(1.0, count * share) for count in most) / len(turns)


def timed(profile: Profile, cluster: Cluster, strategy: Strategy, device: Device | None = None) -> Timed:
    """The times of a profile on a cluster; kept for the next strategy that asks for the same.

    Args:
        profile: for the strategy.
        cluster: on which.
        strategy: how many workers there are.
        device: of the cluster; the slowest if left out, which all others wait for.
    """
    seconds = Seconds.on(cluster, strategy, profile.tp, profile.precision, device)
    return profile.kept.once(seconds.key, lambda: _timed(profile, seconds))


def _timed(profile: Profile, seconds: Seconds) -> Timed:
    spent: dict[int, tuple[Spent, ...]] = {}
    layers: list[Layer] = [link.layer for link in profile.links]
    for layer in layers:
        if id(layer) not in spent:
            spent[id(layer)] = (
                *seconds.of_layer(layer),
                *(seconds.again(each) for each in (layer.forward, layer.recomputed)),
                *(seconds.again(each, products=True) for each in (layer.forward, layer.recomputed)),
            )
    rows = [spent[id(layer)] for layer in layers]
    keeps = tuple(accumulate((n if layer.keeps else -1 for n, layer in enumerate(layers)), max))
    return Timed(
        seconds.cluster,
        seconds.device,
        seconds.kernels,
        Sums.of([row[0] for row in rows]),
        Sums.of([row[1] for row in rows]),
        Sums.of([row[2] for row in rows]),
        Sums.of([row[3] for row in rows]),
        tuple(row[4] for row in rows),
        Sums.of([row[5] for row in rows]),
        tuple(row[6] for row in rows),
        keeps,
        tuple((number, channels) for number, layer in enumerate(layers) for channels in layer.normalised),
        seconds.crowded,
    )
