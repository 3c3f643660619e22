"""Costs of the passes of one stage: compute, and the communication of `fully_shard` or gradient buckets meanwhile."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict.closed_form.offload import fetched, offloads
from shardwise.predict.closed_form.overlap import ComputePiece, Passed, bucketed, gathered
from shardwise.predict.closed_form.pipeline import Messages
from shardwise.predict.closed_form.pipeline_links import workers_at_once
from shardwise.predict.closed_form.segment_times import PassSeconds, SegmentTimes
from shardwise.predict.hardware.network import level_of
from shardwise.predict.hardware.times import collective_seconds, overlap_of
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Profile
from shardwise.predict.runtime.runtime import Runtime
from shardwise.predict.workers.buckets import Gathered
from shardwise.predict.workers.groups import group_of, message_group
from shardwise.predict.workers.holdings import Parts, Stage
from shardwise.predict.workers.passes import Sync
from shardwise.predict.workers.small_kernels import BYTES, loss_kernels
from shardwise.predict.workers.stage_keys import stage_key
from shardwise.splitting.schedule import BACKWARD, FORWARD, INPUT, WEIGHT
from shardwise.strategy import Strategy


class CommunicationTimes:
    """Seconds of collectives, pipeline messages and copies, cached.

    Args:
        profile, strategy, cluster: what is predicted.
        times: seconds of the profile's segments on the device.
    """

    def __init__(self, profile: Profile, strategy: Strategy, cluster: Cluster, times: SegmentTimes) -> None:
        self.profile, self.strategy, self.cluster, self.times = profile, strategy, cluster, times
        self._on = Same(cluster)
        self._moved: dict[tuple[float, float, int], PassSeconds] = {}

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
        key = ("collective", self._on, operation, size, group, crowd)
        collective = Collective(operation, size, group)
        return self.profile.memo.once(key, lambda: collective_seconds(collective, self.cluster, crowd))

    def moved(self, elements: float, size: float, count: int) -> PassSeconds:
        """Return the seconds of `count` copy kernels that together move `elements` elements and `size` bytes."""
        if count < 1 or elements < 1:
            return PassSeconds()
        key = elements, size, count
        if key not in self._moved:
            self._moved[key] = self._copied(elements, size, count)
        return self._moved[key]

    def small(self, count: int) -> PassSeconds:
        """Return the seconds of `count` kernels on a few numbers; see `workers.small_kernels`."""
        return self.moved(count, BYTES * count, count)

    def _copied(self, elements: float, size: float, count: int) -> PassSeconds:
        kernel = Kernel("copy", "memory", "float32", 0.0, size / count, (max(1, round(elements / count)),), count=count)
        return self.times.launched(kernel)

    def message(self, source: int, target: int, sizes: Iterable[int]) -> float:
        """Return the seconds of messages sent one after another between two stages; 0.0 if one rank holds both."""
        strategy = self.strategy
        source, target = source % strategy.pp, target % strategy.pp
        if source == target:
            return 0.0
        group = message_group(strategy, source, target)
        return sum(self.sent(size, group) for size in sizes)

    def sent(self, size: int, group: Group) -> float:
        """Return the seconds of one message of `size` bytes between the two ranks of a group."""
        workers = workers_at_once(self.strategy, self.cluster, group) if self.cluster.collectives else 0
        return self.collective("send", size, group, workers)


def reduction(runtime: Runtime, strategy: Strategy) -> str:
    """Return the collective that sums the gradients of replicas which hold all parameters."""
    parts = strategy.zero == 1 and runtime.sharded_reduction and not runtime.owners
    return "reduce_scatter" if parts else "all_reduce"


class StageCosts:
    """Times of the passes of a strategy's stages, cached.

    Args:
        profile, strategy, cluster, times: as of `CommunicationTimes`.
        parts: the workers of the strategy and their stages.

    Attributes:
        calls: seconds of single collectives, messages and copies.
        messages: messages that each stage receives before a pass.
        stops_host: whether workers wait for messages, so that no host runs ahead of its device over several passes.
    """

    def __init__(
        self, profile: Profile, strategy: Strategy, cluster: Cluster, times: SegmentTimes, parts: Parts
    ) -> None:
        self.profile, self.strategy, self.cluster, self.times, self.parts = profile, strategy, cluster, times, parts
        self.calls = CommunicationTimes(profile, strategy, cluster, times)
        self.stops_host = strategy.pp > 1 and not profile.runtime.overlap_pipeline
        self.messages = self._between()
        self.blocking = times.device.kind == "cpu"
        self.overlap = overlap_of(times.device)
        self._passed: dict[object, Passed] = {}
        self._alikes: dict[int, int] = {}
        self._numbers: dict[object, int] = {}
        self._grouped: dict[tuple[Gathered | None, bool, bool], tuple[float, float, float]] = {}
        self._last = max(parts.stages)
        self._fsdp, self._dp = group_of(strategy, "fsdp"), group_of(strategy, "dp")

    def _between(self) -> Messages:
        found: dict[tuple[str, int], list[tuple[int, float]]] = {}
        pp = self.strategy.pp
        for number, stage in self.parts.stages.items():
            for kind, messages in ((FORWARD, stage.sent), (BACKWARD, stage.returned)):
                for target, sizes in messages:
                    if target % pp != number % pp:
                        seconds = 0.0 if self.stops_host else self.calls.message(number, target, sizes)
                        found.setdefault((kind, target), []).append((number, seconds))
        return found

    def waits(self, kind: str, stage: int) -> float:
        """Return the seconds of all messages that a stage receives before a forward (F) or backward (B) pass."""
        return sum(seconds for _, seconds in self.messages.get((kind, stage), ()))

    def spent(self, stage: Stage, kind: str) -> PassSeconds:
        """Return the time of one microbatch's pass through a stage, with recomputation and batch norms over replicas.

        `kind` is F, B, I or W, as in `splitting.schedule`.
        """
        times = self.times
        if kind == WEIGHT:
            return times.weights.between(stage.first, stage.end)
        forward = kind == FORWARD
        spent = (times.forward if forward else times.backward).between(stage.first, stage.end)
        if not forward and kind != INPUT and self.profile.split:
            spent += times.weights.between(stage.first, stage.end)
        if not forward:
            for block in stage.recomputed:
                spent += times.again(block.first, block.end, products=self.strategy.saves_products)
        return spent + PassSeconds(exchanges=self._norms(stage, forward) + self._sending(stage, kind))

    def _sending(self, stage: Stage, kind: str) -> float:
        """Return the seconds for which a pass waits until its results are sent, in software that waits for that."""
        if not self.stops_host:
            return 0.0
        messages = stage.sent if kind == FORWARD else stage.returned
        return sum(self.calls.message(stage.number, target, sizes) for target, sizes in messages)

    def _norms(self, stage: Stage, forward: bool) -> float:
        if self.strategy.replicas == 1 or not self.times.normalised:
            return 0.0
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        total = 0.0
        for segment, channels in self.times.normalised:
            if not stage.first <= segment < stage.end:
                continue
            gather = self.calls.collective("all_gather", 4 * self.strategy.replicas * (2 * channels + 1), group)
            if forward:
                total += gather
            else:
                total += self.calls.collective("all_reduce", 8 * channels, group)
                total += gather if any(block.first <= segment < block.end for block in stage.recomputed) else 0.0
        return total

    def passed(self, stage: Stage, kind: str, sync: Sync | None, final: bool, first: bool) -> Passed:
        """Return the costs of one pass of one stage, cached for all stages that are equal up to their position.

        Args:
            stage: the stage.
            kind: F, B, I or W, as in `splitting.schedule`.
            sync: communication of `fully_shard` around the pass; None without it.
            final: whether the stage's gradients are complete after the pass.
            first: whether it is the first pass to compute gradients; later ones add to them.
        """
        key = self._alike(stage), kind, sync, final, first
        if key not in self._passed:
            self._passed[key] = self._pass(stage, kind, sync, final, first)
        return self._passed[key]

    def _alike(self, stage: Stage) -> int:
        """Return a number that stages share if they are equal and their replicas communicate equally fast."""
        if stage.number not in self._alikes:
            group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
            sends = stage.number if self.stops_host else 0
            traits = stage_key(self.profile, stage), self._like(group), sends
            self._alikes[stage.number] = self._numbers.setdefault(traits, len(self._numbers))
        return self._alikes[stage.number]

    def _like(self, group: Group) -> Group:
        """Return the group moved to rank 0 if its collectives take equally long there, else the group as it is."""
        begins = replace(group, first=0)
        levels = self.cluster.levels
        same_level = (
            not self.cluster.collectives and levels and level_of(begins, self.cluster) == level_of(group, self.cluster)
        )
        return begins if same_level else group

    def _pass(self, stage: Stage, kind: str, sync: Sync | None, final: bool, first: bool) -> Passed:
        spent = self.computed(stage, kind, sync, final=final, first=first)
        if sync is not None and kind != WEIGHT:
            pieces, root = self.pieces(stage, kind, sync, spent)
            return gathered(spent, pieces, root, self.overlap, blocking=self.blocking)
        if final and stage.buckets and kind != WEIGHT and self.profile.runtime.overlap_gradients:
            return bucketed(spent, self.buckets(stage, spent.device), self.overlap)
        return Passed(spent)

    def computed(self, stage: Stage, kind: str, sync: Sync | None, *, final: bool, first: bool) -> PassSeconds:
        """Return the compute time of one pass: `spent`, and copies of gradients and gathered parameters.

        Arguments as of `passed`.
        """
        spent = self.spent(stage, kind)
        if not self.strategy.runs_module:
            spent += self.times.overhead("stage")
        if stage.number == self._last:
            spent += self.calls.small(loss_kernels(self.strategy, kind))
        if kind not in (FORWARD, INPUT):
            spent += self._gradients(stage, final=final, first=first)
        if sync is None or kind == WEIGHT:
            return spent
        groups = Counter((block.gathered, sync.blocks) for block in stage.blocks) + Counter([(stage.root, sync.root)])
        for (group, gathers), count in groups.items():
            if group is not None:
                gather, reduce = self._sizes(group)
                sizes = (gather if gathers else 0, reduce if sync.reduces else 0)
                spent = sum((self.calls.moved(size / 4, 2 * size, 1).times(count) for size in sizes), spent)
        watched = sum(n for (group, gathers), n in groups.items() if group is not None and (gathers or sync.reduces))
        return spent + self.times.overhead("sharded", watched)

    def buckets(self, stage: Stage, seconds: float) -> list[tuple[float, float]]:
        """Return (time at which it is complete, seconds of its all-reduce) of each bucket.

        Times count from the start of the backward pass, which takes `seconds`.
        """
        times = self.times
        group = group_of(self.strategy, "replicas", stage.number % self.strategy.pp)
        whole = times.backward.total[stage.end] - times.backward.total[stage.first]
        stretch = seconds / whole if whole else 1.0
        end, total = times.backward.total[stage.end], times.backward.total
        operation, share = reduction(self.profile.runtime, self.strategy), self.profile.reduced
        takes = {b.bytes: self.calls.collective(operation, round(share * b.bytes), group) for b in stage.buckets}
        return [((end - total[bucket.ready]) * stretch, takes[bucket.bytes]) for bucket in stage.buckets]

    def _gradients(self, stage: Stage, *, final: bool, first: bool) -> PassSeconds:
        """Return the time to add gradients to those of earlier microbatches and to copy them into buckets."""
        if self.profile.runtime.kernels:
            return PassSeconds()  # they are among the runtime's kernels
        elements, size, count = self.trained(stage)
        spent = PassSeconds() if first else self.calls.moved(elements, 3 * size, count)
        if final and stage.buckets and not self.strategy.splits_parameters:
            copies = 1 if self.strategy.runs_module else 2
            spent += self.calls.moved(elements, 2 * size, count).times(copies)
        return spent

    def trained(self, stage: Stage) -> tuple[int, int, int]:
        """Return (elements, bytes, count) of the trained parameters of a stage."""

        def count() -> tuple[int, int, int]:
            own = [self.profile.parameters[index] for index in self.profile.within(stage.first, stage.end)]
            own = [parameter for parameter in own if parameter.trained]
            return sum(p.elements for p in own), sum(p.bytes for p in own), len(own)

        return self.profile.memo.once(("trained", stage.first, stage.end), count)

    def pieces(
        self, stage: Stage, kind: str, sync: Sync, spent: PassSeconds
    ) -> tuple[list[ComputePiece], ComputePiece]:
        """Return the pieces of a pass between gathers, in the order in which they compute, and the root's piece.

        The times of the pieces are scaled so that they add up to `spent.device`.
        """
        forward = kind == FORWARD
        sums = self.times.forward if forward else self.times.backward
        whole = sums.total[stage.end] - sums.total[stage.first]
        stretch = spent.device / whole if whole else 1.0
        found: list[ComputePiece] = []
        at = stage.first
        for number, block in enumerate(stage.blocks):
            if block.first > at:
                found.append(ComputePiece((sums.total[block.first] - sums.total[at]) * stretch))
            seconds = (sums.total[block.end] - sums.total[max(at, block.first)]) * stretch
            found.append(
                ComputePiece(seconds, *self._group(block.gathered, sync.blocks, sync.reduces), f"block {number}")
            )
            at = max(at, block.end)
        if at < stage.end:
            found.append(ComputePiece((sums.total[stage.end] - sums.total[at]) * stretch))
        root = ComputePiece(0.0, *self._group(stage.root, sync.root, sync.reduces))
        return (found if forward else found[::-1]), root

    def _group(self, group: Gathered | None, gathers: bool, reduces: bool) -> tuple[float, float, float]:
        """Return the seconds of (all-gather, reduce-scatter, all-reduce over dp) of a group of parameters, cached."""
        key = group, gathers, reduces
        if key not in self._grouped:
            self._grouped[key] = (0.0, 0.0, 0.0) if group is None else self._sharing(group, gathers, reduces)
        return self._grouped[key]

    def _sharing(self, group: Gathered, gathers: bool, reduces: bool) -> tuple[float, float, float]:
        collective = self.calls.collective
        size, reduced = self._sizes(group)
        gather = collective("all_gather", size, self._fsdp) + self._fetched(group.gather) if gathers else 0.0
        if not reduces or not group.reduce:
            return gather, 0.0, 0.0
        mirror = collective("all_reduce", reduced // self.strategy.fsdp, self._dp)
        scatter = collective("reduce_scatter", reduced, self._fsdp) + self._fetched(group.reduce)
        return gather, scatter, mirror

    def _sizes(self, group: Gathered) -> tuple[int, int]:
        """Return the bytes of a group's parameters when they are gathered, and of its gradients when reduced."""
        return round(self.profile.gathered * group.gather), round(self.profile.scattered * group.reduce)

    def _fetched(self, size: int) -> float:
        """Return the seconds to copy this worker's shard of `size` gathered bytes from the host, or back.

        Returns 0 if nothing is offloaded.
        """
        device = self.times.device
        return fetched(size / self.strategy.fsdp, device) if offloads(self.strategy, device) else 0.0
