"""Process group over several hosts: through shared memory within each host, by gloo between them, see `host_layers`.

A collective runs in pieces: while one piece is on its way between the hosts, others are reduced or copied within them.
Messages, all other operations and small collectives are gloo's, over all workers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.host_layers import LEAST_BYTES
from shardwise.launch.shared_memory import collectives
from shardwise.launch.shared_memory.choice import LAYERED
from shardwise.launch.shared_memory.collectives import SlotOperation
from shardwise.launch.shared_memory.neighbours import Met
from shardwise.launch.shared_memory.process_group import SharedMemoryGroup
from shardwise.launch.shared_memory.reduction import Reduction

PIECE_BYTES = 4 * 2**20
"""Bytes of a piece of a collective, counted as in `collective.Collective`."""

_OPERATORS = (dist.ReduceOp.SUM, dist.ReduceOp.AVG, dist.ReduceOp.PRODUCT, dist.ReduceOp.MIN, dist.ReduceOp.MAX)
"""Operations of which the result over all workers is that over the hosts of those within the hosts."""


class ByGloo:
    """Collective that gloo runs over all workers."""

    def __init__(self, begin: Callable[[], Any]) -> None:
        self._begin = begin

    def start(self) -> bool:
        """Do nothing: other hosts wait for this worker."""
        return False

    def finish(self) -> None:
        """Run it."""
        self._begin().wait()


class Layered:
    """Collective in layers, a piece at a time.

    Args:
        pieces: number of pieces.
        within: function that runs the first step of a piece, within this host.
        between: function that begins the step of a piece between the hosts, and returns its work.
        after: function that runs the rest of a piece once that is over.
    """

    def __init__(
        self,
        pieces: int,
        within: Callable[[int], None],
        between: Callable[[int], Any],
        after: Callable[[int], None],
    ) -> None:
        self._pieces, self._within, self._between, self._after = pieces, within, between, after

    def start(self) -> bool:
        """Do nothing: the others wait for the later steps."""
        return False

    def finish(self) -> None:
        """Run all pieces."""
        works: list[Any] = []
        for number in range(self._pieces + 1):
            if number < self._pieces:
                self._within(number)
                works.append(self._between(number))
            if number > 0:
                works[number - 1].wait()
                self._after(number - 1)


def _by_gloo(name: str) -> Callable[..., Any]:
    """Return a method that calls the one of the group of gloo over all workers."""

    def call(group: LayeredGroup, *arguments: Any) -> Any:
        return getattr(group._everybody, name)(*arguments)

    return call


class LayeredGroup(SharedMemoryGroup):
    """Process group whose workers share memory within each host.

    Args:
        met: workers of this host, and the ranks of all hosts.
        rank: rank of this process in the group.
        count: number of workers.
        gloo: function of (name, rank, workers) that creates a group of gloo.
    """

    transport = LAYERED

    def __init__(self, met: Met, rank: int, count: int, gloo: Callable[[str, int, int], Any]) -> None:
        super().__init__(met.neighbours, rank, count)
        self._hosts, self._number = met.hosts, met.neighbours.rank
        host = next(index for index, row in enumerate(met.hosts) if rank in row)
        self._everybody = gloo("gloo", rank, count)
        self._between = gloo(f"between-{self._number}", host, len(met.hosts))

    def shutdown(self) -> None:
        """Leave the group."""
        super().shutdown()
        self._everybody.shutdown()
        self._between.shutdown()

    send, recv, gather, scatter = map(_by_gloo, ("send", "recv", "gather", "scatter"))
    alltoall, alltoall_base, all_to_all_single = map(_by_gloo, ("alltoall", "alltoall_base", "alltoall_base"))

    def _told(self, data: Tensor, root: int) -> SlotOperation:
        opts = dist.BroadcastOptions()
        opts.rootRank = root
        return ByGloo(lambda: self._everybody.broadcast([data], opts))

    def _joined(self) -> SlotOperation:
        return ByGloo(self._everybody.barrier)

    def _reduced(self, flat: Tensor, asked: Any) -> SlotOperation:
        opts = dist.AllreduceOptions()
        opts.reduceOp = asked
        if not _splits(flat.nbytes, flat.dtype, asked):
            return ByGloo(lambda: self._everybody.allreduce([flat], opts))
        slots, reduction = self._slots, Reduction(asked)
        whole = _split(flat, PIECE_BYTES // flat.itemsize // slots.count * slots.count)
        padded = [_padded(piece, slots.count) for piece in whole]
        rows = [list(piece.view(slots.count, -1)) for piece in padded]

        def within(piece: int) -> None:
            collectives.reduce_scatter(slots, rows[piece][slots.rank], rows[piece], reduction).finish()

        def between(piece: int) -> Any:
            return self._between.allreduce([rows[piece][slots.rank]], opts)

        def after(piece: int) -> None:
            parts = [row.view(torch.uint8) for row in rows[piece]]
            collectives.all_gather(slots, parts, parts[slots.rank]).finish()
            if padded[piece] is not whole[piece]:
                whole[piece].copy_(padded[piece][: len(whole[piece])])

        return Layered(len(rows), within, between, after)

    def _reduce_scattered(self, output: Tensor, parts: Sequence[Tensor], asked: Any) -> SlotOperation:
        opts = dist.ReduceScatterOptions()
        opts.reduceOp = asked
        if not _splits(output.nbytes * len(parts), output.dtype, asked):
            return ByGloo(lambda: self._everybody.reduce_scatter([output], [list(parts)], opts))
        slots, reduction = self._slots, Reduction(asked)
        results = _split(output, _part_bytes(len(parts)) // output.itemsize)
        pieces = [_split(part, len(results[0])) for part in parts]
        sent: dict[int, Tensor] = {}
        came: dict[int, Tensor] = {}

        def within(piece: int) -> None:
            sent[piece] = output.new_empty(len(self._hosts), len(results[piece]))
            for host, ranks in enumerate(self._hosts):
                theirs = [pieces[rank][piece] for rank in ranks]
                collectives.reduce_scatter(slots, sent[piece][host], theirs, reduction).finish()

        def between(piece: int) -> Any:
            came[piece] = torch.empty_like(sent[piece])
            return self._between.alltoall_base(came[piece], sent[piece], [], [])

        def after(piece: int) -> None:
            reduction.combine(list(came.pop(piece)), results[piece])
            del sent[piece]

        return Layered(len(results), within, between, after)

    def _gathered(self, outputs: Sequence[Tensor], part: Tensor) -> SlotOperation:
        if len(part) * len(outputs) < LEAST_BYTES:
            return ByGloo(lambda: self._everybody.allgather([list(outputs)], [part]))
        pieces = _split(part, _part_bytes(len(outputs)))
        results = [_split(output, len(pieces[0])) for output in outputs]

        def between(piece: int) -> Any:
            mine = [results[ranks[self._number]][piece] for ranks in self._hosts]
            return self._between.allgather([mine], [pieces[piece]])

        def after(piece: int) -> None:
            for ranks in self._hosts:
                host = [results[rank][piece] for rank in ranks]
                collectives.all_gather(self._slots, host, host[self._number]).finish()

        return Layered(len(pieces), lambda piece: None, between, after)


def _splits(bytes_: int, dtype: torch.dtype, asked: Any) -> bool:
    """Return whether a reduction runs in layers: means of whole numbers, for one, are not those of the hosts' means."""
    return bytes_ >= LEAST_BYTES and dtype.is_floating_point and getattr(asked, "op", asked) in _OPERATORS


def _part_bytes(workers: int) -> int:
    """Return the bytes of one worker's part of a piece, a multiple of all element sizes."""
    return max(1, PIECE_BYTES // workers // 64) * 64


def _split(flat: Tensor, size: int) -> list[Tensor]:
    return list(flat.split(size))  # type: ignore[no-untyped-call]


def _padded(piece: Tensor, count: int) -> Tensor:
    """Return a piece, or a copy with zeros at its end if it cannot be cut into `count` equal parts."""
    size = -(-len(piece) // count) * count
    if size == len(piece):
        return piece
    padded = piece.new_zeros(size)
    padded[: len(piece)].copy_(piece)
    return padded
