"""Costs of the passes of one stage: compute, and the communication of `fully_shard` or gradient buckets meanwhile."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

from shardwise.cluster.cluster import Cluster
from shardwise.collective import Collective, Group
from shardwise.predict.closed_form.compression import flats_of, work_of
from shardwise.predict.closed_form.offload import fetched, offloads
from shardwise.predict.closed_form.overlap import Passed, TimedPiece, overlapped
from shardwise.predict.closed_form.pipeline import Messages
from shardwise.predict.closed_form.pipeline_links import workers_at_once
from shardwise.predict.closed_form.segment_times import PassSeconds, SegmentTimes
from shardwise.predict.hardware.network import level_of
from shardwise.predict.hardware.times import collective_seconds, overlap_of
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.memo import Same
from shardwise.predict.profile.profile import Profile
from shardwise.predict.workers.groups import group_of
from shardwise.predict.workers.holdings import Parts, Stage
from shardwise.predict.workers.passes import Sync
from shardwise.predict.workers.small_kernels import BYTES, loss_kernels
from shardwise.predict.workers.stage_keys import stage_key
from shardwise.predict.workers.step_program import Communication, StepProgram, is_sharing
from shardwise.splitting.compression import error_elements
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

    def of(self, each: Collective) -> float:
        """Return the seconds of a collective or message of the step program."""
        if each.operation in ("send", "recv"):
            return self.sent(each.bytes, each.group)
        return self.collective(each.operation, each.bytes, each.group)

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

    def sent(self, size: int, group: Group) -> float:
        """Return the seconds of one message of `size` bytes between the two ranks of a group."""
        workers = workers_at_once(self.strategy, self.cluster, group) if self.cluster.collectives else 0
        return self.collective("send", size, group, workers)


class StageCosts:
    """Times of the passes of a strategy's stages, cached.

    Args:
        profile, strategy, cluster, times: as of `CommunicationTimes`.
        parts: the workers of the strategy and their stages.

    Attributes:
        calls: seconds of single collectives, messages and copies.
        program: what is priced.
        messages: messages that each stage receives before a pass.
        stops_host: whether workers wait for messages, so that no host runs ahead of its device over several passes.
    """

    def __init__(
        self, profile: Profile, strategy: Strategy, cluster: Cluster, times: SegmentTimes, parts: Parts
    ) -> None:
        self.profile, self.strategy, self.cluster, self.times, self.parts = profile, strategy, cluster, times, parts
        self.calls = CommunicationTimes(profile, strategy, cluster, times)
        self.program = StepProgram(profile, parts)
        self.stops_host = strategy.pp > 1 and not profile.runtime.overlap_pipeline
        self.messages = self._between()
        self.blocking = times.device.kind == "cpu"
        self.overlap = overlap_of(times.device)
        self._passed: dict[object, Passed] = {}
        self._alikes: dict[int, int] = {}
        self._numbers: dict[object, int] = {}
        self._around: dict[Same[Communication], tuple[float, tuple[float, ...]]] = {}
        self._last = max(parts.stages)
        self._casts = profile.runtime.copies and profile.gathered < 1

    def _between(self) -> Messages:
        return {
            (kind, stage.number): [
                (source, 0.0 if self.stops_host else sum(map(self.calls.of, messages)))
                for source, messages in self.program.received(stage, kind)
            ]
            for stage in self.parts.stages.values()
            for kind in (FORWARD, BACKWARD)
        }

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
        alone = sum(map(self.calls.of, self.program.norms(stage, kind))) + self._sending(stage, kind)
        return spent + PassSeconds(exchanges=alone)

    def _sending(self, stage: Stage, kind: str) -> float:
        """Return the seconds for which a pass waits until its results are sent, in software that waits for that."""
        if not self.stops_host:
            return 0.0
        return sum(self.calls.of(each) for _, messages in self.program.sent(stage, kind) for each in messages)

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
        pieces = self.pieces(stage, kind, sync, final, spent)
        return overlapped(spent, pieces, self.overlap, blocking=self.blocking and sync is not None)

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
        if sync is None:
            return spent
        pieces = self.program.pieces(stage, kind, sync, final=final)
        sharing = Counter(Same(piece.communication) for piece in pieces)
        moved = Counter(
            {each: count for around, count in sharing.items() for each in around.value.collectives if is_sharing(each)}
        )
        for each, count in moved.items():
            spent += self.calls.moved(each.bytes / 4, 2 * each.bytes, 1).times(count)
            if self._casts and each.operation == "all_gather":  # a shard is cast before it is gathered
                shard = each.bytes / self.strategy.fsdp
                spent += self.calls.moved(shard / 2, 3 * shard, 1).times(count)
        return spent + self.times.overhead("sharded", moved.total())

    def pieces(self, stage: Stage, kind: str, sync: Sync | None, final: bool, spent: PassSeconds) -> list[TimedPiece]:
        """Return the seconds of the pieces of a pass; those of compute add up to `spent.device`."""
        total = (self.times.forward if kind == FORWARD else self.times.backward).total
        whole = total[stage.end] - total[stage.first]
        stretch = spent.device / whole if whole else 1.0
        return [
            TimedPiece(piece, (total[piece.end] - total[piece.first]) * stretch, *self._waits(piece.communication))
            for piece in self.program.pieces(stage, kind, sync, final=final)
        ]

    def _waits(self, around: Communication) -> tuple[float, tuple[float, ...]]:
        """Return the seconds of the gather before a piece, and of each reduction after it."""
        key = Same(around)
        if key not in self._around:
            gather = 0.0 if around.gather is None else self._shared(around.gather)
            self._around[key] = gather, tuple(map(self._shared, around.reductions))
        return self._around[key]

    def _shared(self, each: Collective) -> float:
        """Return the seconds of a collective; with offloading, also to copy its shard from the host or back."""
        device, seconds = self.times.device, self.calls.of(each)
        if is_sharing(each) and offloads(self.strategy, device):
            seconds += fetched(each.bytes / self.strategy.fsdp, device)
        return seconds

    def _gradients(self, stage: Stage, *, final: bool, first: bool) -> PassSeconds:
        """Return the time to add gradients to those of earlier microbatches and to copy them into buckets."""
        if self.profile.runtime.kernels:
            return PassSeconds()  # they are among the runtime's kernels
        elements, size, count = self.trained(stage)
        copies = self.profile.runtime.copies and not self.strategy.splits_parameters
        adds = copies and not first and not (final and stage.buckets)  # without a cast, see `precision.Copies.adds`
        spent = PassSeconds() if first else self.calls.moved(elements, size * (5 / 2 if adds else 3), count)
        if copies and not adds:
            casts = 2 if first else 1  # of each gradient; and of the parameter, once in a step
            copied = self.trained(stage, copied=True)
            spent += self.calls.moved(copied[0], copied[1] * 3 / 2, copied[2]).times(casts)
        if final and stage.buckets and not self.strategy.splits_parameters:
            spent += self.calls.moved(elements, 2 * size, count)
            if self.strategy.reduce:  # each bucket is cast, and what comes back is cast again
                spent += self.calls.moved(elements, size * 3 / 2, len(stage.buckets)).times(2)
        if self.strategy.compress and (final or self.strategy.reduces_at_once):
            spent += self._compressing(stage)
        return spent

    def _compressing(self, stage: Stage) -> PassSeconds:
        """Return the time of the kernels that compress the gradients of a stage."""
        work, spent = work_of(self.strategy), PassSeconds()
        for shapes in flats_of(self.strategy, stage):
            elements = error_elements(shapes)
            spent += self.calls.moved(elements, work.moved * elements / work.kernels, 1).times(work.kernels)
        return spent

    def trained(self, stage: Stage, *, copied: bool = False) -> tuple[int, int, int]:
        """Return `trained_within` of a stage's segments."""
        return trained_within(self.profile, stage.first, stage.end, copied=copied)


def trained_within(
    profile: Profile, first: int, end: int, *, copied: bool = False, shared: bool = False
) -> tuple[int, int, int]:
    """Return (elements, bytes, count) of the trained parameters of segments.

    Args:
        profile: the profile.
        first: first segment.
        end: the segment after the last one.
        copied: whether to count only those with a narrow copy.
        shared: whether to count only those that several segments of the profile use.
    """

    def count() -> tuple[int, int, int]:
        own = [profile.parameters[index] for index in profile.within(first, end)]
        own = [parameter for parameter in own if parameter.trained and not (copied and parameter.kept)]
        own = [parameter for parameter in own if not shared or len(parameter.segments) > 1]
        return sum(p.elements for p in own), sum(p.bytes for p in own), len(own)

    return profile.memo.once(("trained", first, end, copied, shared), count)
