"""Lower bound of the step time of a pipeline whose replicas gather parameters and scatter gradients (`fully_shard`).

The bounds of `time_bounds` take these collectives as hidden. Here each pass waits for what cannot hide, in all ways of
`predict.closed_form.overlap.overlapped`. A pass computes C seconds without communication and takes at least

    C + w    w = e + s (K - e): of its K seconds of collectives, e find nothing to compute. The others slow the device
             down by the share s of the time. A pass begins with the gather of its first block, and ends with the
             scatter of its last one and the all-reduce of that over dp
    K        collectives run one after the other

K counts the parameters of a stage as one group without padding, and leaves out those that several of its blocks share.
On modelled links a collective is not faster for more bytes, or in several parts.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from shardwise.cluster.cluster import Cluster
from shardwise.planner.search.time_bounds import MANY, cut_stages, gather_seconds, scatter_seconds, seconds_of
from shardwise.predict.closed_form.pipeline_links import slower_links
from shardwise.predict.closed_form.segment_times import timed
from shardwise.predict.closed_form.step_time import SHORT_TABLE
from shardwise.predict.hardware.times import overlap_of
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Profile
from shardwise.predict.runtime.element_bytes import scattered
from shardwise.predict.workers.cuts import cuts_of
from shardwise.predict.workers.passes import EqualPasses, turns
from shardwise.splitting.schedule import FORWARD, WEIGHT
from shardwise.strategy import Strategy

Floats = npt.NDArray[np.float64]


def sharded_seconds(profile: Profile, strategy: Strategy, cluster: Cluster) -> float:
    """Bound the step time of a pipeline with sharded parameters from below, in seconds.

    Returns 0 for any other strategy, and where links are measured or so slow that they influence the cuts.
    """
    if not strategy.splits_parameters or strategy.pp == 1 or strategy.speeds:
        return 0.0
    if cluster.collectives or slower_links(profile, strategy, cluster):
        return 0.0
    pipeline = _pipeline(profile, strategy, cluster)
    if strategy.pp * strategy.stages_per_worker * strategy.microbatches <= SHORT_TABLE:
        return max(pipeline.chain(), pipeline.worker(strategy))
    if strategy.schedule == "zero-bubble":
        return pipeline.zero_bubble(strategy)
    return max(pipeline.chain(), pipeline.formula(strategy))


@dataclass(frozen=True, slots=True)
class _Wait:
    """Least seconds that a pass of each stage takes longer than it computes.

    Attributes:
        slope: w, as above.
        most: w, or what K is longer than the computation.
    """

    slope: Floats
    most: Floats

    @classmethod
    def of(cls, alone: Floats, every: Floats, slowdown: float, computed: Floats, after: Floats | float = 0.0) -> _Wait:
        """Return the wait from e (`alone` and `after`) and K (`every`); `after` is not part of K."""
        slope = alone + after + slowdown * np.maximum(0.0, every - alone)
        return cls(slope, np.maximum(slope, every - computed))


@dataclass(frozen=True, slots=True)
class _Passes:
    """Numbers and kinds of the passes of each stage that gather its blocks, by stage index.

    Attributes:
        forward, backward: number of forward and of backward passes that gather.
        usual_forward, usual_backward: whether the most frequent pass gathers; of equally frequent ones, any.
        last_apart: whether the most frequent backward pass is certain to be another one than the last.
    """

    forward: Floats
    backward: Floats
    usual_forward: npt.NDArray[np.bool_]
    usual_backward: npt.NDArray[np.bool_]
    last_apart: npt.NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Pipeline:
    """Seconds of each stage by stage index: what its passes compute, its messages, and how long its passes wait.

    Attributes:
        forward, backward: seconds that a pass computes.
        adds: the part of `backward` in which gradients are added to those of earlier microbatches: not in a first pass.
        arrives, returns: seconds of the messages before a forward and before a backward pass.
        gathers_forward, gathers_backward: wait of a pass that gathers.
        scatters: wait of the last backward pass.
        passes: which passes gather.
    """

    forward: Floats
    backward: Floats
    adds: Floats
    arrives: Floats
    returns: Floats
    gathers_forward: _Wait
    gathers_backward: _Wait
    scatters: _Wait
    passes: _Passes

    @property
    def _once(self) -> Floats:
        """Return the seconds of the first forward and the last backward pass, with the messages before them."""
        messages = self.arrives + self.returns
        return self.forward + self.gathers_forward.most + self.backward + self.scatters.most + messages

    def chain(self) -> float:
        """Bound by the first forward pass through all stages, and the last backward pass through all of them.

        In a formula of `pipeline` both are there too: one microbatch alone takes the most frequent pass of each stage,
        and what the first and the last pass take longer is added. In zero-bubble's formula, gradients of weights are
        missing for all stages but the first.
        """
        return float(self._once.sum())

    def worker(self, strategy: Strategy) -> float:
        """Bound by all passes of a worker. The stages before its first one run before it, and again after it.

        A zero-bubble pipeline may compute gradients of weights after it that it could have computed earlier.
        """
        gathers = self.passes.forward * self.gathers_forward.most + self.passes.backward * self.gathers_backward.most
        busy = strategy.microbatches * (self.forward + self.backward) - self.adds + gathers + self.scatters.most
        first = self._once if strategy.schedule != "zero-bubble" else self._entering(self.gathers_forward.most)
        before = np.cumsum(first[: strategy.pp]) - first[: strategy.pp]
        return float((before + _by_worker(busy, strategy.pp)).max())

    def _entering(self, wait: Floats) -> Floats:
        return self.arrives + self.forward + wait

    def formula(self, strategy: Strategy) -> float:
        """Bound a pipeline that `pipeline.pipeline_seconds` prices by the most frequent passes f and b of each stage.

        All its formulas but zero-bubble's are at least m (f + b) of the busiest worker, and f + b of the first stage of
        all other workers. Leaving out the largest first stage is right whoever is the busiest.
        """
        forward, backward = self._usual
        first = (forward + backward + self.arrives + self.returns)[: strategy.pp]
        busy = _by_worker(forward + backward, strategy.pp).max()
        return float(strategy.microbatches * busy + first.sum() - first.max()) + self._ends

    def zero_bubble(self, strategy: Strategy) -> float:
        """Bound a zero-bubble pipeline that is priced by a formula: all passes of a worker, after it was entered."""
        forward, backward = self._usual
        entered = np.cumsum(self.arrives + forward) - forward
        return float((entered + strategy.microbatches * (forward + backward)).max()) + self._ends

    @property
    def _usual(self) -> tuple[Floats, Floats]:
        """Return the seconds of the most frequent forward and backward pass."""
        forward = self.forward + np.where(self.passes.usual_forward, self.gathers_forward.most, 0.0)
        return forward, self.backward + np.where(self.passes.usual_backward, self.gathers_backward.most, 0.0)

    @property
    def _ends(self) -> float:
        """Return the seconds that the first forward and the last backward passes take longer than the usual ones.

        Where usual passes gather too, nothing is certain. Else their seconds are known but for copies of gradients,
        which are part of both, so that the difference is at least the slope.
        """
        first = np.where(self.passes.usual_forward, 0.0, self.gathers_forward.slope)
        last = np.where(self.passes.usual_backward | ~self.passes.last_apart, 0.0, self.scatters.slope)
        return float(first.sum() + last.sum())


def _by_worker(seconds: Floats, workers: int) -> Floats:
    found: Floats = seconds.reshape(-1, workers).sum(axis=0)
    return found


def _pipeline(profile: Profile, strategy: Strategy, cluster: Cluster) -> _Pipeline:
    cut = cut_stages(profile, strategy, cluster)
    times = timed(profile, cluster, strategy)
    *computed, adds = profile.memo.once(
        ("bounds", "arrays", Same(cut)),
        lambda: (
            np.array(
                [
                    (each.forward, each.backward, each.arrives, each.returns, adds)
                    for each, adds in zip(cut.passes, cut.adds, strict=True)
                ]
            ).T
        ),
    )
    forward, backward, arrives, returns = computed
    if strategy.microbatches < MANY:
        adds = np.zeros_like(adds)
    backward = backward + adds
    cuts = cuts_of(profile, strategy, times.forward.each)
    sizes, kinds = profile.memo.once(("bounds", "sizes", Same(cuts)), lambda: _kinds(profile, cuts))
    waits = np.array([_collectives(profile, strategy, cluster, size) for size in sizes])[kinds].T
    first, last, gathers, scatter, mirror, scatters = waits
    slowdown = 1.0 - 1.0 / overlap_of(times.device)
    return _Pipeline(
        forward,
        backward,
        adds,
        arrives,
        returns,
        _Wait.of(first, gathers, slowdown, forward),
        _Wait.of(last, gathers, slowdown, backward),
        _Wait.of(scatter, scatters, slowdown, backward, mirror),
        _passes(strategy.schedule, strategy.pp, strategy.stages, strategy.microbatches, strategy.zero),
    )


@dataclass(frozen=True, slots=True)
class _Sizes:
    """Bytes of parameters of a stage: of its first block and the trained ones there, its last block, and all blocks."""

    first: int
    trained: int
    last: int
    all: int
    all_trained: int


def _collectives(profile: Profile, strategy: Strategy, cluster: Cluster, size: _Sizes) -> tuple[float, ...]:
    """Return the seconds of the gathers and scatters of a stage, in the order in which `_pipeline` takes them."""
    gathers = (gather_seconds(profile, each, strategy, cluster) for each in (size.first, size.last, size.all))
    shard = 0 if strategy.compress else round(scattered(profile, strategy) * size.trained) // strategy.fsdp
    return (
        *gathers,
        scatter_seconds(profile, size.trained, strategy, cluster),
        seconds_of("all_reduce", shard, strategy, "dp", cluster),
        scatter_seconds(profile, size.all_trained, strategy, cluster),
    )


def _kinds(profile: Profile, cuts: Sequence[Sequence[int]]) -> tuple[list[_Sizes], list[int]]:
    """Return the distinct sizes of stages, and for each stage the index of its own."""
    known: dict[_Sizes, int] = {}
    ends = [*(starts[0] for starts in cuts[1:]), len(profile.segments)]
    found = [known.setdefault(_sizes(profile, starts, end), len(known)) for starts, end in zip(cuts, ends, strict=True)]
    return list(known), found


def _sizes(profile: Profile, starts: Sequence[int], end: int) -> _Sizes:
    blocks = [
        [profile.parameters[index] for index in profile.within(first, last)]
        for first, last in zip(starts, [*starts[1:], end], strict=True)
    ]
    blocks = [
        [
            parameter
            for parameter in block
            if not parameter.whole
            and not parameter.buffer
            and all(first <= segment < last for segment in parameter.segments if starts[0] <= segment < end)
        ]
        for block, first, last in zip(blocks, starts, [*starts[1:], end], strict=True)
    ]
    every = [sum(parameter.bytes for parameter in block) for block in blocks]
    trained = [sum(parameter.bytes for parameter in block if parameter.trained) for block in blocks]
    return _Sizes(every[0], trained[0], every[-1], sum(every), sum(trained))


@lru_cache(maxsize=4096)
def _passes(schedule: str, pp: int, stages: int, microbatches: int, zero: int) -> _Passes:
    """Return which passes gather: the same for any number of shards."""
    strategy = Strategy(fsdp=2, zero=zero, tp=2, pp=pp, schedule=schedule, stages=stages, microbatches=microbatches)
    own: dict[int, list[EqualPasses]] = {}
    for pipeline_rank in range(pp):
        for turn in turns(strategy, pipeline_rank):
            if turn.action.kind != WEIGHT:
                own.setdefault(turn.action.stage, []).append(turn)
    found = [_of_stage(own[stage]) for stage in sorted(own)]
    return _Passes(*(np.array(each) for each in zip(*found, strict=True)))


def _of_stage(passes: Sequence[EqualPasses]) -> tuple[int, int, bool, bool, bool]:
    """Return the attributes of `_Passes` for one stage."""
    forward = [turn for turn in passes if turn.action.kind == FORWARD]
    backward = [turn for turn in passes if turn.action.kind != FORWARD]
    others = [turn for turn in backward if not turn.final]
    usual_forward, usual_backward = _most_frequent(forward), _most_frequent(others or backward)
    return (
        sum(turn.count for turn in forward if _gathers(turn)),
        sum(turn.count for turn in backward if _gathers(turn)),
        any(map(_gathers, usual_forward)),
        any(map(_gathers, usual_backward)),
        bool(others) and usual_backward[0].count > 1,
    )


def _most_frequent(passes: Sequence[EqualPasses]) -> list[EqualPasses]:
    most = max(turn.count for turn in passes)
    return [turn for turn in passes if turn.count == most]


def _gathers(turn: EqualPasses) -> bool:
    return turn.sync is not None and turn.sync.blocks
