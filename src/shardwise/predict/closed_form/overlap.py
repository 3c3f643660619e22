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
from itertools import zip_longest

from shardwise.predict.closed_form.segment_times import PassSeconds


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


def gathered(
    spent: PassSeconds, pieces: Sequence[ComputePiece], root: ComputePiece, overlap: float, *, blocking: bool
) -> Passed:
    """Return the costs of a pass of a sharded stage.

    Args:
        spent: the pass without communication.
        pieces: pieces of the stage, in the order in which they compute.
        root: the piece that is gathered before all others and reduced after them.
        overlap: factor by which the device computes more slowly while it communicates.
        blocking: whether communication blocks the worker, so that nothing is hidden.
    """
    total = root.communication + sum(piece.communication for piece in pieces)
    if blocking:
        return Passed(spent, total, total)
    now = channel = root.gather
    outer = 0.0  # time until which the channel of dp is busy
    asked = 0.0  # time at which the gather of the next piece is issued: when the piece before it begins to compute
    computed = more = 0.0
    reductions: list[tuple[float, ComputePiece]] = []

    def reduce() -> None:
        nonlocal channel, outer
        while reductions:
            ready, piece = reductions.pop(0)
            channel = max(channel, ready) + piece.reduce
            outer = max(outer, channel) + piece.mirror if piece.mirror else outer

    for piece, following in zip_longest(pieces, pieces[1:]):
        if piece.gather:
            channel = max(channel, asked) + piece.gather
            now = max(now, channel)
        reduce()  # reductions of earlier pieces are queued behind this gather
        asked = now
        ahead = max(channel, now) + following.gather if following is not None and following.gather else channel
        end = _advanced(now, piece.compute, max(ahead, outer), overlap)
        computed, more = computed + piece.compute, more + end - now - piece.compute
        now = end
        if piece.reduce:
            reductions.append((now, piece))
    if root.reduce:
        reductions.append((now, root))
    reduce()
    return Passed(spent, total, max(now, channel, outer) - computed - more, more)


def bucketed(spent: PassSeconds, buckets: Iterable[tuple[float, float]], overlap: float) -> Passed:
    """Return the costs of a backward pass with the all-reduces of gradient buckets.

    Args:
        spent: the pass without communication.
        buckets: (time at which it is complete, seconds of its all-reduce) of each bucket, in order, if compute is not
            slowed down.
        overlap: factor by which the device computes more slowly while it communicates.
    """
    now = channel = total = computed = 0.0
    for ready, seconds in buckets:
        now, computed = _advanced(now, ready - computed, channel, overlap), ready
        channel = max(channel, now) + seconds
        total += seconds
    now = _advanced(now, spent.device - computed, channel, overlap)
    return Passed(spent, total, max(0.0, channel - now), now - spent.device)


def _advanced(now: float, compute: float, busy: float, overlap: float) -> float:
    """Return the time at which `compute` seconds at full speed are done that begin now.

    Until the time `busy` the device communicates too, and computes at 1 / `overlap` of its speed.
    """
    slow = max(0.0, busy - now)
    if compute * overlap <= slow:
        return now + compute * overlap
    return now + slow + compute - slow / overlap
