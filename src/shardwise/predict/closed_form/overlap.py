"""Overlap of compute and communication in one pass of one stage on one worker.

A worker computes on one stream and communicates on another. Collectives of one group run one after the other, as NCCL
runs them; collectives of different groups run concurrently:

    buckets    a gradient bucket is all-reduced as soon as the backward pass has completed it; the pass ends when the
               last all-reduce is done                               (Li et al. 2020, PyTorch Distributed, section 4)
    gathers    while one block computes, the next one is gathered and the gradients of the block that computed before
               are reduce-scattered                                  (Zhao et al. 2023, PyTorch FSDP, section 3.3)

On a CPU an all-gather or a reduce-scatter of `fully_shard` blocks the worker: nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardwise.predict.closed_form.segment_times import PassSeconds
from shardwise.predict.hardware.times import slowed


@dataclass(frozen=True, slots=True)
class ComputePiece:
    """Consecutive segments that compute without a break, with the all-gather before and the reduction after them.

    Attributes:
        compute: seconds of compute.
        gather: seconds of the all-gather that it waits for.
        reduce: seconds of the reduce-scatter of its gradients.
        mirror: seconds of the all-reduce over dp of the scattered gradients (hybrid sharding).
        name: name for display.
    """

    compute: float
    gather: float = 0.0
    reduce: float = 0.0
    mirror: float = 0.0
    name: str = ""

    @property
    def communication(self) -> float:
        """Return the seconds of its communication, hidden or not."""
        return self.gather + self.reduce + self.mirror


@dataclass(frozen=True, slots=True)
class Passed:
    """Costs of one pass of one stage.

    Attributes:
        compute: time of kernels, exchanges and launches.
        communication: seconds of gathers, reductions and buckets, hidden or not.
        exposed: seconds of `communication` for which the worker waits.
        slowed: seconds by which compute takes longer because the worker communicates meanwhile.
    """

    compute: PassSeconds
    communication: float = 0.0
    exposed: float = 0.0
    slowed: float = 0.0


def gathered(pieces: Sequence[ComputePiece], root: ComputePiece, *, blocking: bool) -> tuple[float, float]:
    """Return (communication, exposed) seconds of a pass of a sharded stage.

    Args:
        pieces: pieces of the stage, in the order in which they compute.
        root: the piece that is gathered before all others and reduced after them.
        blocking: whether communication blocks the worker, so that nothing is hidden.
    """
    total = root.communication + sum(piece.communication for piece in pieces)
    if blocking:
        return total, total
    now = channel = root.gather
    outer = 0.0  # time until which the channel of dp is busy
    asked = 0.0  # time at which the gather of the next piece is issued: when the piece before it begins to compute
    computed = 0.0
    reductions: list[tuple[float, ComputePiece]] = []

    def reduce() -> None:
        nonlocal channel, outer
        while reductions:
            ready, piece = reductions.pop(0)
            channel = max(channel, ready) + piece.reduce
            outer = max(outer, channel) + piece.mirror if piece.mirror else outer

    for piece in pieces:
        if piece.gather:
            channel = max(channel, asked) + piece.gather
            now = max(now, channel)
        reduce()  # reductions of earlier pieces are queued behind this gather
        asked = now
        now += piece.compute
        computed += piece.compute
        if piece.reduce:
            reductions.append((now, piece))
    if root.reduce:
        reductions.append((now, root))
    reduce()
    return total, max(now, channel, outer) - computed


def bucketed(buckets: Iterable[tuple[float, float]], end: float) -> tuple[float, float]:
    """Return (communication, exposed) seconds of the all-reduces of gradient buckets.

    Args:
        buckets: (time at which it is complete, seconds of its all-reduce) of each bucket, in order.
        end: time at which the backward pass has computed everything.
    """
    channel = total = 0.0
    for ready, seconds in buckets:
        channel = max(channel, ready) + seconds
        total += seconds
    return total, max(0.0, channel - end)


def overlapped(spent: PassSeconds, communication: float, exposed: float, ends: float, overlap: float) -> Passed:
    """Return the costs of a pass whose communication slows its compute where the two overlap.

    Slower compute hides more communication, so that a pass which waits for communication anyway does not take longer.

    Args:
        spent: the pass without communication.
        communication: seconds of all communication.
        exposed: seconds of it for which a pass at full speed waits.
        ends: seconds of communication that nothing can hide: before the first and after the last compute.
        overlap: factor by which the device computes more slowly meanwhile, see `hardware.times.overlap_of`.
    """
    more = slowed(communication - exposed, overlap)
    return Passed(spent, communication, max(exposed - more, min(exposed, ends)), more)
