"""Seconds of a profile's segments on a device of a cluster, as prefix sums: any range of segments is one subtraction.

The host launches a segment's kernels one after the other. Where the device is faster, the segment is launch-bound (Yu
et al. 2021):

    seconds = max(sum of kernel times, launches x launch time)

A CPU both launches kernels and computes them, so that the two add up there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from itertools import accumulate

import numpy as np
import numpy.typing as npt

from shardwise.cluster.cluster import Cluster, Device
from shardwise.collective import Collective, Group
from shardwise.options import dtype_of
from shardwise.predict.hardware.constants import constants
from shardwise.predict.hardware.times import KernelTimes, collective_seconds, delay, launches, overlap_of
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Exchanged, Layer, LayerPass, Profile
from shardwise.predict.profile.summary import ProfileSummary
from shardwise.predict.runtime.runtime import SHARDWISE, Runtime
from shardwise.strategy import Strategy

Floats = npt.NDArray[np.float64]

WATCHED_SECONDS = 4e-5
"""Assumed overhead of the host for each kernel of a block under selective recomputation
(`parallel.operators.selective_checkpoint`), forward and recomputation together, if none was measured. It was 37
microseconds on a core of an EPYC of 2024.
"""


@dataclass(frozen=True, slots=True)
class PassSeconds:
    """Seconds of a pass, or of a part of it.

    Attributes:
        kernels: seconds of kernels on the device.
        exchanges: seconds of the collectives of tensor parallelism, which block the device.
        launching: seconds of the host to launch the kernels.
        inline: whether the device is the host (a CPU), so that launching and computing do not overlap.
        lag: seconds for which the device waits for its host somewhere in the pass, if both begin together; negative if
            the pass is one stretch, whose end is all that its host can delay.
    """

    kernels: float = 0.0
    exchanges: float = 0.0
    launching: float = 0.0
    inline: bool = False
    lag: float = -1.0

    @property
    def device(self) -> float:
        """Return the seconds of the device if its host runs ahead of it."""
        return self.kernels + self.exchanges + (self.launching if self.inline else 0.0)

    @property
    def behind(self) -> float:
        """Return the seconds by which the host ends after the device; negative if it ends before, 0 on a CPU."""
        return 0.0 if self.inline else self.launching - self.device

    @property
    def waiting(self) -> float:
        """Return the seconds for which the device waits for its host, if both begin together."""
        return self.lag if self.lag >= 0 else max(0.0, self.behind)

    @property
    def total(self) -> float:
        """Return the seconds including waiting for the host."""
        return self.device + self.waiting

    def __add__(self, other: PassSeconds) -> PassSeconds:
        """Return the time of one after the other: a lead of the host from the first shortens waiting in the second."""
        return PassSeconds(
            self.kernels + other.kernels,
            self.exchanges + other.exchanges,
            self.launching + other.launching,
            self.inline or other.inline,
            max(self.waiting, self.behind + other.waiting, 0.0),
        )

    def times(self, count: float) -> PassSeconds:
        """Return the seconds of `count` such passes, one after the other."""
        return PassSeconds(
            self.kernels * count,
            self.exchanges * count,
            self.launching * count,
            self.inline,
            self.waiting + max(0.0, count - 1) * max(0.0, self.behind),
        )


@dataclass(frozen=True, slots=True)
class Sums:
    """Prefix sums over segments: entry i is the sum over segments before i, so that there is one entry more.

    Attributes:
        kernels, exchanges, launching, inline: as in `PassSeconds`.
        total: seconds of the device if its host runs ahead of it.
        behind: prefix sums of `PassSeconds.behind`.
        backward: whether the pass goes through the segments from the last to the first.
        each: seconds of each segment alone (not a sum), as the program measures them to cut stages.
        lags: cache of the lags of ranges.
    """

    kernels: tuple[float, ...]
    exchanges: tuple[float, ...]
    launching: tuple[float, ...]
    inline: bool
    total: tuple[float, ...]
    behind: Floats
    backward: bool
    each: tuple[float, ...]
    lags: dict[tuple[int, int], float] = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def of(cls, spent: Sequence[PassSeconds], *, backward: bool = False) -> Sums:
        """Build the sums from the time of each segment."""
        return cls(
            tuple(accumulate((each.kernels for each in spent), initial=0.0)),
            tuple(accumulate((each.exchanges for each in spent), initial=0.0)),
            tuple(accumulate((each.launching for each in spent), initial=0.0)),
            any(each.inline for each in spent),
            tuple(accumulate((each.device for each in spent), initial=0.0)),
            np.cumsum([0.0, *(each.behind for each in spent)]),
            backward,
            tuple(each.total for each in spent),
        )

    def between(self, first: int, end: int) -> PassSeconds:
        """Return the time of segments `first` to `end`."""
        return PassSeconds(
            self.kernels[end] - self.kernels[first],
            self.exchanges[end] - self.exchanges[first],
            self.launching[end] - self.launching[first],
            self.inline,
            self._lag(first, end),
        )

    def _lag(self, first: int, end: int) -> float:
        """Return the most that the host is behind after any segment, counted from where the pass begins."""
        if self.inline or first == end:
            return 0.0
        if (first, end) not in self.lags:
            at = self.behind[first : end + 1]
            self.lags[first, end] = max(0.0, float(at[-1] - at.min() if self.backward else at.max() - at[0]))
        return self.lags[first, end]


@dataclass(frozen=True, slots=True)
class SegmentTimes:
    """Times of a profile's segments on one device of a cluster.

    Attributes:
        cluster: the cluster.
        device: the device; by default the slowest of the cluster, which all others wait for.
        kernels: times of kernels on the device.
        forward: forward pass.
        backward: backward pass; if the profile is split, only for gradients of inputs.
        weights: pass for gradients of weights, if the profile is split.
        repeated: forward pass as a recomputation.
        recomputed: recomputation of each segment if it is the last one to recompute, which stops early.
        rest, recomputed_rest: like `repeated` and `recomputed`, under selective recomputation.
        last_saving: for each segment, the last one up to it of which the backward pass needs any tensor; -1 if there is
            none.
        normalised: (segment, channels) of each batch norm.
        crowded: factor by which the host takes longer because workers outnumber cores.
    """

    cluster: Cluster
    device: Device
    kernels: KernelTimes
    forward: Sums
    backward: Sums
    weights: Sums
    repeated: Sums
    recomputed: tuple[PassSeconds, ...]
    rest: Sums
    recomputed_rest: tuple[PassSeconds, ...]
    last_saving: tuple[int, ...]
    normalised: tuple[tuple[int, int], ...]
    crowded: float = 1.0

    def overhead(self, what: str, count: int = 1) -> PassSeconds:
        """Return the host's overhead `what`, `count` times; see `cluster.Device.overheads`."""
        seconds = self.device.overheads.get(what, 0.0) * count * self.crowded
        return PassSeconds(launching=seconds, inline=self.device.kind == "cpu")

    @property
    def crowding(self) -> float:
        """Return the extra seconds of each step because workers outnumber cores; 0 if they do not."""
        return self.device.overheads.get("crowded", 0.0) * (self.crowded - 1.0)

    def again(self, first: int, end: int, *, products: bool = False) -> PassSeconds:
        """Return the time to recompute segments `first` to `end`, up to the last tensor that the backward pass needs.

        If `products` is set, recomputation is selective: the results of `strategy.PRODUCTS` are kept.
        """
        last = self.last_saving[end - 1]
        if last < first:
            return PassSeconds()
        if products:
            return self.rest.between(first, last) + self.recomputed_rest[last]
        return self.repeated.between(first, last) + self.recomputed[last]

    def launched(self, kernel: Kernel) -> PassSeconds:
        """Return the time of a kernel on the device, with its launches."""
        host = kernel.count * self.device.launch_seconds * self.crowded
        return PassSeconds(self.kernels.seconds(kernel), launching=host, inline=self.device.kind == "cpu")


def slowest(cluster: Cluster, precision: str) -> Device:
    """Return the device of a cluster that all others wait for: the lowest rate in the dtype of the computation."""
    return min((nodes.device for nodes in cluster.nodes), key=lambda device: device.flops.get(dtype_of(precision), 0.0))


def half_rate(device: Device) -> float:
    """Return the FLOPs per second of a device in bf16, else in fp16; 0 if it has neither, or is no faster in them."""
    rate = device.flops.get("bf16", device.flops.get("fp16", 0.0))
    return rate if rate > device.flops.get("float32", 0.0) else 0.0


@dataclass(frozen=True)
class Seconds:
    """Times of passes on one device of a cluster.

    Attributes:
        cluster: the cluster.
        device: one of its devices.
        tp: degree of tensor parallelism.
        crowd: workers of a host that communicate at the same time.
        busy: average workers of a host that compute at the same time: fewer in a pipeline, whose workers take turns.
        runtime: the software whose host launches the kernels.
        exchanges: cache of the times of exchanges.
    """

    cluster: Cluster
    device: Device
    tp: int
    crowd: int
    busy: float
    runtime: Runtime = SHARDWISE
    exchanges: dict[Exchanged, float] = field(default_factory=dict)

    @classmethod
    def on(
        cls, profile: Profile | ProfileSummary, cluster: Cluster, strategy: Strategy, device: Device | None = None
    ) -> Seconds:
        """Build the times for a strategy's workers on a device of the cluster; None selects the slowest device."""
        workers = min(strategy.workers, cluster.node_size)
        device = device or slowest(cluster, profile.precision)
        crowd = workers if device.shared or device.curves or cluster.collectives else 1
        return cls(cluster, device, profile.tp, crowd, _busy(crowd, device, strategy), profile.runtime)

    @cached_property
    def kernels(self) -> KernelTimes:
        """Return the times of kernels, made only when needed: results that are cached by `key` do not need them."""
        return KernelTimes(self.device, self.busy)

    @property
    def key(self) -> tuple[object, ...]:
        """Return the cache key for results that are derived from these times."""
        return "timed", Same(self.cluster), Same(self.device), self.crowd, self.busy

    @property
    def crowded(self) -> float:
        """Return the factor by which the host takes longer because workers outnumber cores; 1 on a GPU."""
        device = self.device
        return max(1.0, self.busy / device.cores) if device.kind == "cpu" and device.cores else 1.0

    def of(self, each: LayerPass) -> PassSeconds:
        """Return the time of one pass through a layer."""
        busy = sum(self.kernels.seconds(kernel) for kernel in each.kernels)
        sent = sum(map(self._exchange, each.exchanges))
        launch, exchange = self._host
        host = launches(each.kernels) * launch + len(each.exchanges) * exchange
        return PassSeconds(busy, sent, host * self.crowded, self.device.kind == "cpu")

    def of_layer(self, layer: Layer) -> tuple[PassSeconds, PassSeconds, PassSeconds]:
        """Return the times of a layer's forward pass, backward pass and pass for gradients of weights."""
        return self.of(layer.forward), self.of(layer.backward), self.of(layer.weights)

    def again(self, each: LayerPass, *, products: bool = False) -> PassSeconds:
        """Return the time to recompute a pass; with `products` it is selective and keeps `strategy.PRODUCTS`."""
        return self.of(each.rest if products else each) + self.watched(each, products=products)

    def watched(self, each: LayerPass, *, products: bool = False) -> PassSeconds:
        """Return the host's time that recomputation of a pass takes beside that of its kernels; see `again`."""
        overheads = self.device.overheads
        host = overheads.get("again", 0.0) + (overheads.get("selective", WATCHED_SECONDS) if products else 0.0)
        return PassSeconds(launching=host * launches(each.kernels) * self.crowded, inline=self.device.kind == "cpu")

    @cached_property
    def _host(self) -> tuple[float, float]:
        """Return the host's seconds to launch one kernel and one exchange."""
        if self.runtime.graphs:
            return 0.0, 0.0
        if self.runtime.fitted_host:
            return constants().host_kernel, constants().host_collective
        return self.device.launch_seconds, self.device.overheads.get("exchange", 0.0)

    def _exchange(self, exchange: Exchanged) -> float:
        """Return the seconds for which an exchange delays its worker."""
        if exchange not in self.exchanges:
            group = Group(exchange.ranks, exchange.stride) if exchange.ranks else Group(self.tp)
            collective = Collective(exchange.operation, exchange.bytes, group)
            seconds = collective_seconds(collective, self.cluster, self.crowd)
            beside = seconds if exchange.hidden else self.of(LayerPass(exchange.beside)).device
            self.exchanges[exchange] = delay(seconds, beside, overlap_of(self.device))
        return self.exchanges[exchange]


def _busy(workers: int, device: Device, strategy: Strategy) -> float:
    """Return how many of a host's workers compute at the same time, on average.

    If the workers of a pipeline outnumber the cores, those that wait leave their cores to others. Else it is `workers`.
    """
    if device.kind != "cpu" or strategy.pp == 1 or workers <= device.cores:
        return workers
    ranks_per_host = max(1, min(strategy.pp, workers // strategy.stride("pp")))
    passes = max(strategy.microbatches, 1) * strategy.stages_per_worker
    if strategy.schedule == "zero-bubble":  # passes are a third as long, and so are the bubbles
        passes *= 3
    return device.cores * _dilation(strategy.pp, ranks_per_host, passes, workers / ranks_per_host / device.cores)


@lru_cache(maxsize=4096)
def _dilation(pp: int, ranks_per_host: int, passes: int, share: float) -> float:
    """Return the average factor by which the turns of a pipeline take longer because workers wait for cores.

    In turn t the workers with pipeline ranks t - passes + 1 to t compute (Narayanan et al. 2021, figure 3). A turn
    takes as long as the host on which most of them run.

    Args:
        pp: number of pipeline ranks.
        ranks_per_host: consecutive pipeline ranks on one host.
        passes: passes of each worker, one per turn.
        share: share of a host's cores that its workers of one pipeline rank would use.
    """
    turns = range(passes + pp - 1)
    hosts = [range(first, min(first + ranks_per_host, pp)) for first in range(0, pp, ranks_per_host)]
    most = (
        max(sum(pipeline_rank <= turn < pipeline_rank + passes for pipeline_rank in host) for host in hosts)
        for turn in turns
    )
    return sum(max(1.0, count * share) for count in most) / len(turns)


def timed(profile: Profile, cluster: Cluster, strategy: Strategy, device: Device | None = None) -> SegmentTimes:
    """Return the times of a profile's segments on a cluster, cached for all strategies with the same times.

    Args:
        profile: the profile for the strategy.
        cluster: the cluster.
        strategy: the strategy, which decides how many workers share a host.
        device: a device of the cluster; None selects the slowest one, which all others wait for.
    """
    seconds = Seconds.on(profile, cluster, strategy, device)
    return profile.memo.once(seconds.key, lambda: _timed(profile, seconds))


def _timed(profile: Profile, seconds: Seconds) -> SegmentTimes:
    spent: dict[int, tuple[PassSeconds, ...]] = {}
    layers: list[Layer] = [segment.layer for segment in profile.segments]
    for layer in layers:
        if id(layer) not in spent:
            spent[id(layer)] = (
                *seconds.of_layer(layer),
                *(seconds.again(each) for each in (layer.forward, layer.recomputed)),
                *(seconds.again(each, products=True) for each in (layer.forward, layer.recomputed)),
            )
    rows = [spent[id(layer)] for layer in layers]
    last_saving = tuple(accumulate((n if layer.saves else -1 for n, layer in enumerate(layers)), max))
    return SegmentTimes(
        seconds.cluster,
        seconds.device,
        seconds.kernels,
        Sums.of([row[0] for row in rows]),
        Sums.of([row[1] for row in rows], backward=True),
        Sums.of([row[2] for row in rows], backward=True),
        Sums.of([row[3] for row in rows]),
        tuple(row[4] for row in rows),
        Sums.of([row[5] for row in rows]),
        tuple(row[6] for row in rows),
        last_saving,
        tuple((number, channels) for number, layer in enumerate(layers) for channels in layer.normalised),
        seconds.crowded,
    )


@dataclass(frozen=True, slots=True)
class Times:
    """Seconds of one microbatch on one rank, summed over all segments.

    Attributes:
        forward, backward, weights: seconds of the passes, tensor-parallel collectives included.
        again: lower bound of full recomputation: each segment up to the last tensor that its backward pass needs.
        repeated: the part of `again` in repeated blocks of the module.
        repeated_rest: `repeated` with selective recomputation, which keeps the results of matmuls.
        seconds: the model that gives the seconds of single passes on the device.
    """

    forward: float
    backward: float
    weights: float
    again: float
    repeated: float
    repeated_rest: float
    seconds: Seconds


def times_of(summary: ProfileSummary, cluster: Cluster, strategy: Strategy) -> Times:
    """Return the seconds of a microbatch on a cluster, cached for all strategies with the same rates."""
    seconds = Seconds.on(summary, cluster, strategy)
    return summary.memo.once(seconds.key, lambda: _summed_times(summary, seconds))


def _summed_times(summary: ProfileSummary, seconds: Seconds) -> Times:
    forward = backward = weights = again = repeated = repeated_rest = 0.0
    for each in summary.layers:
        there, back, of_weights = seconds.of_layer(each.layer)
        forward += each.count * there.device
        backward += each.count * back.device
        weights += each.count * of_weights.device
        if each.layer.saves:
            recomputed = seconds.again(each.layer.recomputed).device
            again += each.count * recomputed
            repeated += each.repeated * recomputed
            repeated_rest += each.repeated * seconds.again(each.layer.recomputed, products=True).device
    return Times(forward, backward, weights, again, repeated, repeated_rest, seconds)
