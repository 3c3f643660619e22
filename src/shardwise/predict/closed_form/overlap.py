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

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, zip_longest

from shardwise.predict.closed_form.segment_times import PassSeconds
from shardwise.predict.workers.step_program import Piece


@dataclass(frozen=True, slots=True)
class TimedPiece:
    """Seconds of one piece of a pass.

    Attributes:
        piece: what is timed.
        compute: seconds of compute.
        gather: seconds of the all-gather that it waits for.
        reductions: seconds of each reduction of its gradients.
    """

    piece: Piece
    compute: float
    gather: float = 0.0
    reductions: tuple[float, ...] = ()

    @property
    def communication(self) -> float:
        """Return the seconds of its communication, hidden or not."""
        return self.gather + sum(self.reductions)


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


def overlapped(spent: PassSeconds, pieces: Sequence[TimedPiece], overlap: float, *, blocking: bool) -> Passed:
    """Return the costs of a pass with the communication around its pieces.

    Args:
        spent: the pass without communication.
        pieces: its pieces, in the order in which they compute.
        overlap: factor by which the device computes more slowly while it communicates.
        blocking: whether communication blocks the worker, so that nothing is hidden.
    """
    total = sum(piece.communication for piece in pieces)
    if blocking:
        return Passed(spent, total, total)
    now = channel = 0.0
    outer = 0.0  # time until which dp all-reduces what fsdp has scattered, on a channel of its own
    asked = 0.0  # time at which the gather of the next piece is issued: when the piece before it begins to compute
    more = 0.0
    reductions: list[tuple[float, TimedPiece]] = []

    def reduce() -> None:
        nonlocal channel, outer
        while reductions:
            ready, piece = reductions.pop(0)
            first, *others = _by_group(piece)
            channel = max(channel, ready) + first
            outer = max(outer, channel) + sum(others) if others else outer

    for piece, following in zip_longest(pieces, pieces[1:]):
        if piece.gather:
            channel = max(channel, asked) + piece.gather
            now = max(now, channel)
        reduce()  # reductions of earlier pieces are queued behind this gather
        asked = now
        ahead = max(channel, now) + following.gather if following is not None and following.gather else channel
        end = _advanced(now, piece.compute, max(ahead, outer), overlap)
        more += end - now - piece.compute
        now = end
        if piece.reductions:
            reductions.append((now, piece))
    reduce()
    computed = sum(piece.compute for piece in pieces)
    return Passed(spent, total, max(now, channel, outer) - computed - more, more)


def _by_group(timed: TimedPiece) -> list[float]:
    """Return the seconds of a piece's reductions, summed for consecutive ones of one group."""
    pairs = zip(timed.piece.communication.reductions, timed.reductions, strict=True)
    return [sum(each for _, each in run) for _, run in groupby(pairs, key=lambda pair: pair[0].group)]


def _advanced(now: float, compute: float, busy: float, overlap: float) -> float:
    """Return the time at which `compute` seconds at full speed are done that begin now.

    Until the time `busy` the device communicates too, and computes at 1 / `overlap` of its speed.
    """
    slow = max(0.0, busy - now)
    if compute * overlap <= slow:
        return now + compute * overlap
    return now + slow + compute - slow / overlap
