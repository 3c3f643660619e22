"""Program of one step: what a pipeline worker computes, and every collective and message that it issues, in order.

    the step     weights of the losses; passes in the order of the schedule; what is left to sum; report; update;
                 average of the last fragment of the parameters, if replicas take local steps
    a pass       receives, computes its pieces one after another, sends
    a piece      waits for its gather, computes a range of segments, and starts the reductions of its gradients

All that describe a step read it here: `traffic` counts it, `closed_form` prices it and sums the memory that it holds,
`timeline` plays it. Tests compare it, in order, with what the real program did in a dry run. Workers are those of the
first replica, with tensor-parallel rank 0.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil

from shardwise.collective import Collective, Group
from shardwise.predict.profile.profile import Exchanged, Profile
from shardwise.predict.runtime.element_bytes import reduced, scattered
from shardwise.predict.runtime.runtime import Runtime
from shardwise.predict.workers.buckets import Bucket, Gathered
from shardwise.predict.workers.groups import group_of, message_group, replica_axis
from shardwise.predict.workers.holdings import Parts, Stage, Worker, report_bytes
from shardwise.predict.workers.passes import EqualPasses, Sync, table
from shardwise.splitting.compression import error_elements, scattered_messages, whole_messages
from shardwise.splitting.schedule import FORWARD, INPUT, WEIGHT
from shardwise.strategy import Strategy

TENSORS = 7
"""Parameters of a block that are gathered one by one where nothing buckets them: four or five matrices, two norms."""

ITEM = 4
"""Bytes of an element of a gradient that is compressed, in float32."""

AHEAD = 1
"""Blocks that a backward pass gathers ahead of the one that it computes (Zhao et al. 2023, PyTorch FSDP, 3.3.2)."""


@dataclass(frozen=True, slots=True)
class Communication:
    """Collectives around one piece.

    Attributes:
        gather: the all-gather that it waits for; None if its parameters are there.
        reductions: what its gradients go through, one after another: a bucket's all-reduce, or a reduce-scatter and
            with hybrid sharding an all-reduce over dp; compressed, the messages in place of these.
    """

    gather: Collective | None = None
    reductions: tuple[Collective, ...] = ()

    @property
    def collectives(self) -> tuple[Collective, ...]:
        """Return all collectives of the piece."""
        return self.reductions if self.gather is None else (self.gather, *self.reductions)


ALONE = Communication()
"""No communication."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Consecutive segments of a pass that compute without a break.

    Attributes:
        first, end: range of segments; empty for the parameters that a whole stage gathers and reduces.
        communication: collectives around it.
        name: name for display.
    """

    first: int
    end: int
    communication: Communication = ALONE
    name: str = ""


Message = tuple[int, tuple[Collective, ...]]
"""(stage at the other end, messages one after another)."""


def is_sharing(each: Collective) -> bool:
    """Return whether `fully_shard` issues a collective: it gathers parameters or scatters gradients."""
    return each.axis == "fsdp" and each.operation in ("all_gather", "reduce_scatter")


def issued(pieces: Sequence[Piece], kind: str) -> Iterator[tuple[Piece, tuple[Collective, ...]]]:
    """Yield the pieces of a pass, each with the gathers that are issued as it begins, or after the loss in it."""
    gathers = [piece.communication.gather for piece in pieces if piece.communication.gather is not None]
    done, due = 0, 0 if kind == FORWARD else AHEAD
    for piece in pieces:
        due += piece.communication.gather is not None
        yield piece, tuple(gathers[done:due])
        done = due


def gathered_blocks(stage: Stage, sync: Sync, segment: int) -> range:
    """Return the indices of a stage's blocks whose parameters are there while a backward pass computes a segment.

    They are those of `issued` that are not freed. In the loss of a module, the last segment, nothing is issued yet: the
    gradient of the module's output asks for the first block.
    """
    index, inside = stage.block_at(segment)
    first = 0
    if sync.blocks:
        if not inside and segment == stage.end - 1:
            return range(0)
        first = max(0, index + (not inside) - AHEAD)
    return range(first, index + 1 if sync.reduces else len(stage.blocks))


def reduction(runtime: Runtime, strategy: Strategy) -> str:
    """Return the collective that sums the gradients of replicas which hold all parameters."""
    parts = strategy.zero == 1 and runtime.sharded_reduction and not runtime.owners
    return "reduce_scatter" if parts else "all_reduce"


class StepProgram:
    """Program of one step of a strategy.

    Args:
        profile: the profile for the strategy.
        parts: the workers of the strategy and their stages.
    """

    def __init__(self, profile: Profile, parts: Parts) -> None:
        self.profile, self.parts, self.strategy = profile, parts, parts.strategy
        self._replicas = replica_axis(self.strategy)
        self._around: dict[tuple[int, Gathered, str, bool, bool], Communication] = {}
        self._pieces: dict[tuple[int, bool, Sync | None, bool], tuple[Piece, ...]] = {}
        self._sources = self._arriving()

    def collectives(self, pipeline_rank: int) -> Iterator[Collective]:
        """Yield everything that a worker issues in one step. Order holds within a group, not between groups."""
        worker = self.parts.workers[pipeline_rank]
        stages = {stage.number: stage for stage in worker.stages}
        yield from self.start(worker)
        for turn in table(self.strategy, pipeline_rank):
            yield from self.of_pass(stages[turn.action.stage], turn)
        yield from self.after_passes(worker)

    def after_passes(self, worker: Worker) -> Iterator[Collective]:
        """Yield everything that a worker issues after its passes; order as in `collectives`."""
        yield from (*self.sums(worker), *self.report(worker), *self.updated(worker), *self.served(worker))
        for last in self.averages(worker)[-1:]:
            yield from last

    # ---- one pass ---------------------------------------------------------------------------------------------------

    def of_pass(self, stage: Stage, turn: EqualPasses) -> Iterator[Collective]:
        """Yield everything that one pass issues; order as in `collectives`."""
        kind = turn.action.kind
        for _, messages in self.received(stage, kind):
            yield from messages
        pieces = self.pieces(stage, kind, turn.sync, final=turn.final)
        for piece, gathers in issued(pieces, kind):
            yield from gathers
            yield from self.exchanges(stage, kind, range(piece.first, piece.end))
            yield from piece.communication.reductions
        for _, messages in self.sent(stage, kind):
            yield from messages

    def pieces(self, stage: Stage, kind: str, sync: Sync | None, *, final: bool) -> tuple[Piece, ...]:
        """Return the pieces of a pass in the order in which they compute.

        Args:
            stage: the stage.
            kind: F, B, I or W, as in `splitting.schedule`.
            sync: what `fully_shard` communicates around the pass; None without it.
            final: whether the stage's gradients are complete after the pass.
        """
        if kind == WEIGHT:
            return (Piece(stage.first, stage.end),)
        forward = kind == FORWARD
        key = stage.number, forward, sync, final
        if key not in self._pieces:
            if sync is None:
                cut = self._bucketed(stage, self._buckets(stage) if final and not forward else [])
            else:
                cut = self._sharded(stage, sync, forward=forward)
            self._pieces[key] = tuple(cut)
        return self._pieces[key]

    def _buckets(self, stage: Stage) -> list[tuple[Bucket, Communication]]:
        """Return the gradient buckets of a stage's last backward pass, with their reduction."""
        if not self.profile.runtime.overlap_gradients:
            return []
        rank = stage.number % self.strategy.pp
        return [(bucket, Communication(reductions=self._joined(bucket, rank))) for bucket in stage.buckets]

    def _joined(self, bucket: Bucket, pipeline_rank: int) -> tuple[Collective, ...]:
        """Return the reductions over replicas of the gradients of a bucket."""
        compression, replicas = self.strategy.compress, self.strategy.replicas
        if not compression or self.strategy.splits_parameters:  # what `fully_shard` leaves whole is sent exactly
            return (self._reduced(bucket.bytes, pipeline_rank),)
        exact = bucket.bytes - ITEM * error_elements(bucket.shapes)
        first = (self._reduced(exact, pipeline_rank),) if exact else ()
        messages = whole_messages(compression, bucket.shapes, replicas)
        rest = (self._collective(each, size, "replicas", "backward", pipeline_rank) for each, size in messages)
        return (*first, *rest)

    def _reduced(self, size: int, pipeline_rank: int) -> Collective:
        """Return the reduction over replicas of the gradients of `size` bytes of parameters."""
        operation = reduction(self.profile.runtime, self.strategy)
        sent = round(reduced(self.profile, self.strategy) * size)
        return self._collective(operation, sent, "replicas", "backward", pipeline_rank)

    def _bucketed(self, stage: Stage, buckets: Sequence[tuple[Bucket, Communication]]) -> Iterator[Piece]:
        """Yield a pass that is cut where gradient buckets are complete (Li et al. 2020, section 4)."""
        at = stage.end
        for number, (bucket, communication) in enumerate(buckets):
            first = min(at, bucket.ready)
            yield Piece(first, at, communication, f"bucket {number}")
            at = first
        if at > stage.first or not buckets:
            yield Piece(stage.first, at, name="after all buckets" if buckets else "")

    def _sharded(self, stage: Stage, sync: Sync, *, forward: bool) -> Iterator[Piece]:
        """Yield a pass of a stage whose parameters `fully_shard` gathers, block by block."""
        begin, end = (stage.first, stage.end) if forward else (stage.end, stage.first)
        whole = self._synced(stage, stage.root, sync.root, sync.reduces, forward=forward)
        if whole.gather is not None:
            yield Piece(begin, begin, Communication(whole.gather), "the rest")
        blocks = list(self._blocks(stage, sync, forward=forward))
        yield from blocks if forward else reversed(blocks)
        if whole.reductions:
            yield Piece(end, end, Communication(reductions=whole.reductions), "the rest")

    def _blocks(self, stage: Stage, sync: Sync, *, forward: bool) -> Iterator[Piece]:
        at = stage.first
        for number, block in enumerate(stage.blocks):
            if block.first > at:
                yield Piece(at, block.first)
            around = self._synced(stage, block.gathered, sync.blocks, sync.reduces, forward=forward)
            yield Piece(max(at, block.first), max(at, block.end), around, f"block {number}")
            at = max(at, block.end)
        if at < stage.end:
            yield Piece(at, stage.end)

    def _synced(
        self, stage: Stage, group: Gathered | None, gathers: bool, reduces: bool, *, forward: bool
    ) -> Communication:
        """Return what `fully_shard` communicates for a group of parameters: one object for equal groups."""
        if group is None:
            return ALONE
        rank, when = stage.number % self.strategy.pp, "forward" if forward else "backward"
        key = rank, group, when, gathers, reduces
        if key not in self._around:
            gathered = round(self.profile.gathered * group.gather)
            sent = round(scattered(self.profile, self.strategy) * group.reduce)
            gather = self._collective("all_gather", gathered, "fsdp", when, rank) if gathers else None
            reductions: list[Collective] = []
            if reduces and sent:
                reductions += [self._collective(*each, when, rank) for each in self._scattered(group, sent)]
            self._around[key] = Communication(gather, tuple(reductions))
        return self._around[key]

    def _scattered(self, group: Gathered, sent: int) -> Iterator[tuple[str, int, str]]:
        """Yield (operation, bytes, axis) of what `fully_shard` does with gradients of a group, of `sent` bytes."""
        strategy, compression = self.strategy, self.strategy.compress
        if compression and strategy.dp == 1:
            exact = group.reduce - ITEM * error_elements(group.shapes, strategy.fsdp)
            if exact:
                yield "reduce_scatter", exact, "fsdp"
            yield from ((*each, "fsdp") for each in scattered_messages(compression, group.shapes, strategy.fsdp))
            return
        yield "reduce_scatter", sent, "fsdp"
        if compression:
            exact = (group.reduce - ITEM * error_elements(group.shapes, strategy.fsdp)) // strategy.fsdp
            if exact:
                yield "all_reduce", exact, "dp"
            slices = [(ceil(shape[0] / strategy.fsdp), *shape[1:]) for shape in group.shapes]
            yield from ((*each, "dp") for each in whole_messages(compression, slices, strategy.dp))
        elif strategy.summing > strategy.fsdp:
            yield "all_reduce", sent // strategy.fsdp, "dp"

    # ---- inside of a pass -------------------------------------------------------------------------------------------

    def exchanges(self, stage: Stage, kind: str, segments: range) -> Iterator[Collective]:
        """Yield the collectives inside of a range of segments: of tensor parallelism and batch norms.

        What computes beside those of tensor parallelism, the profile says (`Exchanged.beside`). Where in the backward
        pass of a recomputed block its recomputation begins, the program does not say: here it comes first.
        """
        rank = stage.number % self.strategy.pp
        if kind == FORWARD:
            for segment in segments:
                yield from self._through(segment, "forward", rank)
            return
        ends = {block.end - 1: block.first for block in stage.recomputed if block.end > block.first}
        for segment in reversed(segments):
            layer = self.profile.segments[segment].layer
            if kind != WEIGHT:
                if segment in ends:
                    yield from self._again(ends[segment], segment + 1, rank)
                yield from self._passed(layer.backward.exchanges, "backward", rank)
                yield from self._norms(segment, "backward", rank)
            if kind != INPUT:
                yield from self._passed(layer.weights.exchanges, "backward", rank)

    def norms(self, stage: Stage, kind: str) -> Iterator[Collective]:
        """Yield the part of `exchanges` that is of batch norms."""
        if self.strategy.summing > 1 and self._normalised:
            segments = range(stage.first, stage.end)
            yield from (each for each in self.exchanges(stage, kind, segments) if each.axis != "tp")

    @property
    def _normalised(self) -> bool:
        segments = self.profile.segments
        return self.profile.memo.once(("normalised",), lambda: any(each.layer.normalised for each in segments))

    def _through(self, segment: int, when: str, rank: int) -> Iterator[Collective]:
        yield from self._passed(self.profile.segments[segment].layer.forward.exchanges, when, rank)
        yield from self._norms(segment, when, rank)

    def _again(self, first: int, end: int, rank: int) -> Iterator[Collective]:
        """Yield what a recomputed block repeats: all up to the last tensor that the backward pass needs."""
        saving = [segment for segment in range(first, end) if self.profile.segments[segment].layer.saves]
        if not saving:
            return
        for segment in range(first, saving[-1]):
            yield from self._through(segment, "recompute", rank)
        yield from self._passed(self.profile.segments[saving[-1]].layer.recomputed.exchanges, "recompute", rank)
        yield from self._norms(saving[-1], "recompute", rank)

    def _passed(self, exchanges: Iterable[Exchanged], when: str, rank: int) -> Iterator[Collective]:
        for each in exchanges:
            group = Group(each.ranks, each.stride) if each.ranks else group_of(self.strategy, "tp", rank)
            yield Collective(each.operation, each.bytes, group, "tp", when)

    def _norms(self, segment: int, when: str, rank: int) -> Iterator[Collective]:
        """Yield what batch norms exchange: (mean, variance, count) of all replicas, and on the way back two sums."""
        if self.strategy.summing == 1:
            return
        for channels in self.profile.segments[segment].layer.normalised:
            if when == "backward":
                yield self._collective("all_reduce", 4 * 2 * channels, "replicas", when, rank)
            else:
                size = 4 * self.strategy.summing * (2 * channels + 1)
                yield self._collective("all_gather", size, "replicas", when, rank)

    # ---- messages ---------------------------------------------------------------------------------------------------

    def sent(self, stage: Stage, kind: str) -> Iterator[Message]:
        """Yield the messages that a stage sends after a pass to stages on other workers."""
        if kind == WEIGHT:
            return
        for target, sizes in stage.sent if kind == FORWARD else stage.returned:
            if target % self.strategy.pp != stage.number % self.strategy.pp:
                yield target, self._messages("send", stage.number, target, sizes, kind)

    def received(self, stage: Stage, kind: str) -> Iterator[Message]:
        """Yield the messages from stages on other workers that a stage waits for before a pass."""
        if kind == WEIGHT:
            return
        for source, sizes in self._sources.get((kind == FORWARD, stage.number), ()):
            if source % self.strategy.pp != stage.number % self.strategy.pp:
                yield source, self._messages("recv", source, stage.number, sizes, kind)

    def _arriving(self) -> dict[tuple[bool, int], list[tuple[int, tuple[int, ...]]]]:
        """Return (whether forward, stage that receives) -> (stage that sends, bytes of each message)."""
        found: dict[tuple[bool, int], list[tuple[int, tuple[int, ...]]]] = {}
        for number, stage in sorted(self.parts.stages.items()):
            for forward, messages in ((True, stage.sent), (False, stage.returned)):
                for target, sizes in messages:
                    found.setdefault((forward, target), []).append((number, sizes))
        return found

    def _messages(
        self, operation: str, source: int, target: int, sizes: Iterable[int], kind: str
    ) -> tuple[Collective, ...]:
        group = message_group(self.strategy, source % self.strategy.pp, target % self.strategy.pp)
        when = "forward" if kind == FORWARD else "backward"
        return tuple(Collective(operation, size, group, "pp", when) for size in sizes)

    # ---- before and after the passes --------------------------------------------------------------------------------

    def start(self, worker: Worker) -> tuple[Collective, ...]:
        """Return what precedes the passes: the sum of the batch's weight over replicas."""
        if not self.profile.weighted or self.strategy.summing == 1 or self.strategy.stale:
            return ()
        return (self._collective("all_reduce", 8, "replicas", "weight", worker.pipeline_rank),)

    def sums(self, worker: Worker) -> tuple[Collective, ...]:
        """Return the reductions of gradients that are left when all passes are over."""
        rank = worker.pipeline_rank
        found = [each for bucket in worker.twice for each in self._joined(bucket, rank)]
        if self.strategy.splits_parameters:  # buckets of what it leaves whole
            buckets = [bucket for stage in worker.stages[::-1] for bucket in stage.buckets]
            found += [each for bucket in buckets for each in self._joined(bucket, rank)]
        elif not self.profile.runtime.overlap_gradients:
            size = sum(bucket.bytes for stage in worker.stages for bucket in stage.buckets)
            found += [self._reduced(size, rank)] if size else []
        if self.strategy.tp > 1:
            found += [self._collective("all_reduce", size, "tp", "backward", rank) for size in worker.summed]
        for holders, size in worker.tied:
            group = Group.of([self.strategy.rank(pp=holder) for holder in holders])
            found.append(Collective("all_reduce", round(self.profile.reduced * size), group, "pp", "backward"))
        return tuple(found)

    def report(self, worker: Worker) -> tuple[Collective, ...]:
        """Return the sum of losses and norms over all workers; local steps sum over those of a replica first."""
        if self.strategy.workers == 1 or self.strategy.stale:
            return ()
        if self.strategy.local:
            groups = [group_of(self.strategy, axis, worker.pipeline_rank) for axis in ("together", "dp")]
            size = report_bytes(self.profile) + 8  # and the weight of each replica
            return tuple(Collective("all_reduce", size, group, "world", "report") for group in groups if group.size > 1)
        return (self._collective("all_reduce", report_bytes(self.profile), "world", "report"),)

    def updated(self, worker: Worker) -> tuple[Collective, ...]:
        """Return how replicas that update parts of the parameters (zero=1) give each other the results."""
        rank, runtime = worker.pipeline_rank, self.profile.runtime
        if self.strategy.zero != 1 or self.strategy.summing == 1:
            return ()
        if runtime.owners:
            return tuple(
                self._collective("broadcast", size, "replicas", "optimizer", rank) for size in worker.broadcast
            )
        calls = 1 if runtime.bucketed else TENSORS * sum(stage.end - stage.first for stage in worker.stages)
        size = round(self.profile.gathered * worker.parameters) // calls
        return (self._collective("all_gather", size, "replicas", "optimizer", rank),) * calls

    def averages(self, worker: Worker) -> tuple[tuple[Collective, ...], ...]:
        """Return the messages that average each fragment of the parameters; every `local` steps each has its turn."""
        return tuple(
            tuple(self._collective("all_reduce", size, "dp", "average", worker.pipeline_rank) for size in sizes)
            for sizes in worker.averaged
        )

    def served(self, worker: Worker) -> tuple[Collective, ...]:
        """Return the messages to and from parameter servers: gradients to each, and its parameters back."""
        group = group_of(self.strategy, "dp")
        pair = Group(2, group.size - 1, group.first)  # the farthest of those beside which servers may run
        pushed = [Collective("send", size, pair, "ps", "push") for _, _, size in worker.served]
        return (*pushed, *(Collective("recv", size, pair, "ps", "pull") for _, _, size in worker.served))

    def _collective(self, operation: str, size: int, axis: str, when: str, pipeline_rank: int = 0) -> Collective:
        """Return a collective of `pipeline_rank`; axis `replicas` is counted as the mesh axis that replicas have."""
        group = group_of(self.strategy, axis, pipeline_rank)
        return Collective(operation, size, group, self._replicas if axis == "replicas" else axis, when)
