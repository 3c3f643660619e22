"""How long one pass of one stage takes on one worker, with what is gathered and reduced meanwhile.

A worker computes on one stream and communicates on another (a group's collectives run one after the other, as NCCL
runs them; those of another group beside them):

    buckets    a gradient bucket is sent as soon as the backward pass has completed it; the pass ends when the last
               bucket has arrived                                    (Li et al. 2020, PyTorch Distributed, section 4)
    gathers    the next block is gathered while one computes; its gradients are scattered while the block before it
               computes                                              (Zhao et al. 2023, PyTorch FSDP, section 3.3)

On a CPU a gather or a scatter of `fully_shard` blocks the worker: nothing is hidden.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from shardwise.predict.timing import Spent


@dataclass(frozen=True, slots=True)
class Piece:
    """Links that compute without a break: what has to be gathered before, and what is reduced after.

    Attributes:
        compute: seconds.
        gather: seconds of the gather that it waits for.
        reduce: seconds in which its gradients are scattered.
        mirror: seconds in which what was scattered is added up over dp.
        name: for people.
    """

    compute: float
    gather: float = 0.0
    reduce: float = 0.0
    mirror: float = 0.0
    name: str = ""

    @property
    def communication(self) -> float:
        """All of it."""
        return self.gather + self.reduce + self.mirror


@dataclass(frozen=True, slots=True)
class Passed:
    """One pass.

    Attributes:
        compute: what was computed.
        communication: seconds of gathers, reductions and buckets, hidden or not.
        exposed: of these, what the worker waited for.
        slowed: by how much computing took longer while it communicated.
    """

    compute: Spent
    communication: float = 0.0
    exposed: float = 0.0
    slowed: float = 0.0


def gathered(pieces: Sequence[Piece], root: Piece, *, blocking: bool) -> tuple[float, float]:
    """(communication, exposed) of a pass through pieces in the order in which they compute.

    Args:
        pieces: of the stage.
        root: what is gathered before all of them, and reduced after all.
        blocking: whether nothing is hidden.
    """
    total = root.communication + sum(piece.communication for piece in pieces)
    if blocking:
        return total, total
    now = channel = root.gather
    outer = 0.0  # the channel of dp
    asked = 0.0  # when the gather of the next piece is asked for: as the piece before it begins to compute
    computed = 0.0
    reductions: list[tuple[float, Piece]] = []

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
        reduce()  # those of earlier pieces stand behind this gather
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
    """(communication, exposed) of gradient buckets.

    Args:
        buckets: (when it is complete, how long it takes), in order.
        end: of the backward pass.
    """
    channel = total = 0.0
    for ready, seconds in buckets:
        channel = max(channel, ready) + seconds
        total += seconds
    return total, max(0.0, channel - end)


def slowed(hidden: float, overlap: float) -> float:
    """How much longer a worker computes that communicates for `hidden` seconds meanwhile.

    While both go on it computes at 1 / `overlap` of its speed (`cluster.Device.overlap`).
    """
    return hidden * (1.0 - 1.0 / overlap) if overlap > 1.0 else 0.0
