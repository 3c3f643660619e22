"""Collectives as sequences of slots. All workers of a group run the same ones in the same order.

`Streamed` has one phase: in every round each worker fills a slot, and uses those of the others. `Reduced` has two: a
worker combines its own part of each slot, and fills another one with the result. It moves less for more than two
workers:

    bytes that a worker reads of others, of n bytes and p workers:    one phase  n (p - 1)     two  2 n (p - 1) / p

A small collective of one phase that is not waited for at once fills its slot when it starts, and uses those of the
others when it is waited for: the others never wait for it, and no thread has to run it beside what computes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from shardwise.launch.shared_memory.reduction import Reduction
from shardwise.launch.shared_memory.segment import SLOT_BYTES
from shardwise.launch.shared_memory.slots import Slots

AHEAD = 2
"""Rounds that a worker fills before it uses the first of them: it writes while the others do."""

ALIGNED = 64
"""Elements of which parts of a slot are multiples, so that no two workers write to one cache line."""

TWO_PHASES = 2**17
"""Bytes from which more than two workers reduce in two phases."""

SMALL = 2**17
"""Bytes up to which a collective fills its slot when it starts. Copying more would hold up the thread that computes."""


class SlotOperation(Protocol):
    """Collective on the slots of a group."""

    def start(self) -> bool:
        """Fill slots as far as that does not wait. Returns whether all are filled and nobody will wait for this one."""

    def finish(self) -> None:
        """Do all that is left."""


class Streamed:
    """Collective of one phase.

    Args:
        slots: slots of the group.
        dtype: dtype of the elements in a slot.
        rounds: number of slots that each writer fills.
        bytes_: bytes that it fills them with.
        fill: function that fills the slot of a round.
        use: function that uses the slots of a round, by rank; None for workers that do not write, and this one.
        writers: ranks that fill slots; None: all.
    """

    def __init__(
        self,
        slots: Slots,
        dtype: torch.dtype,
        rounds: int,
        bytes_: int,
        fill: Callable[[int, Tensor], None],
        use: Callable[[int, Sequence[Tensor | None]], None],
        writers: Sequence[int] | None = None,
    ) -> None:
        self._slots, self._dtype, self._rounds, self._fill, self._use = slots, dtype, rounds, fill, use
        ranks = range(slots.count) if writers is None else writers
        self._read = [rank for rank in ranks if rank != slots.rank]
        self._filled = 0 if slots.rank in ranks else rounds
        self._small = bytes_ <= SMALL

    def start(self) -> bool:
        """Fill the slot of a small collective if it is free."""
        if self._filled < self._rounds and self._small and self._slots.free():
            self._fill_next()
        return self._small and self._filled == self._rounds

    def finish(self) -> None:
        """Fill and use the slots of all rounds."""
        slots, dtype = self._slots, self._dtype
        for number in range(self._rounds):
            while self._filled < min(self._rounds, number + AHEAD):
                self._fill_next()
            found: list[Tensor | None] = [None] * slots.count
            for rank in self._read:
                found[rank] = slots.take(rank, dtype)
            self._use(number, found)
            for rank in self._read:
                slots.release(rank)

    def _fill_next(self) -> None:
        self._fill(self._filled, self._slots.claim(self._dtype))
        self._slots.publish()
        self._filled += 1


class Reduced:
    """All-reduce of a flat tensor in two phases, a slot at a time: the second phase of one beside the next one's first.

    All workers fill their slots in the order s0, s1, r0, s2, r1, s3, r2, ... of what they send and their results.
    """

    def __init__(self, slots: Slots, flat: Tensor, reduction: Reduction) -> None:
        self._slots, self._flat, self._reduction = slots, flat, reduction
        self._others = [rank for rank in range(slots.count) if rank != slots.rank]
        self._pieces = _pieces(flat, _per_slot(flat.dtype))

    def start(self) -> bool:
        """Do nothing: the others wait for the second phase."""
        return False

    def finish(self) -> None:
        """Reduce all pieces."""
        last = len(self._pieces) - 1
        for number in range(last + 1):
            if number == 0:
                self._send(0)
            if number < last:
                self._send(number + 1)
            self._combine(number)
            if number > 0:
                self._gather(number - 1)
        if last >= 0:
            self._gather(last)

    def _part(self, piece: Tensor, rank: int) -> slice:
        size = -(-len(piece) // (self._slots.count * ALIGNED)) * ALIGNED
        return slice(min(rank * size, len(piece)), min((rank + 1) * size, len(piece)))

    def _send(self, number: int) -> None:
        piece = self._pieces[number]
        slot, own = self._slots.claim(piece.dtype), self._part(piece, self._slots.rank)
        for part in (slice(0, own.start), slice(own.stop, len(piece))):
            if part.start < part.stop:
                slot[part].copy_(piece[part])
        self._slots.publish()

    def _combine(self, number: int) -> None:
        piece, slots = self._pieces[number], self._slots
        own = self._part(piece, slots.rank)
        theirs = {rank: slots.take(rank, piece.dtype)[own] for rank in self._others}
        mine = piece[own]
        result = slots.claim(piece.dtype)[: len(mine)]
        if len(mine):
            self._reduction.combine([theirs.get(rank, mine) for rank in range(slots.count)], result)
            mine.copy_(result)
        slots.publish()
        for rank in self._others:
            slots.release(rank)

    def _gather(self, number: int) -> None:
        piece, slots = self._pieces[number], self._slots
        for rank in self._others:
            part = piece[self._part(piece, rank)]
            part.copy_(slots.take(rank, piece.dtype)[: len(part)])
            slots.release(rank)


def all_reduce(slots: Slots, flat: Tensor, reduction: Reduction) -> SlotOperation:
    """Return the all-reduce of a flat tensor in place."""
    if slots.count > 2 and flat.nbytes >= TWO_PHASES:
        return Reduced(slots, flat, reduction)
    pieces = _pieces(flat, _per_slot(flat.dtype))

    def fill(number: int, slot: Tensor) -> None:
        piece = pieces[number]
        slot[: len(piece)].copy_(piece)

    def use(number: int, found: Sequence[Tensor | None]) -> None:
        piece = pieces[number]
        reduction.combine([piece if each is None else each[: len(piece)] for each in found], piece)

    return Streamed(slots, flat.dtype, len(pieces), flat.nbytes, fill, use)


def reduce_scatter(slots: Slots, output: Tensor, parts: Sequence[Tensor], reduction: Reduction) -> SlotOperation:
    """Return the reduce-scatter of each worker's flat parts; `output` is the sum of the parts of this worker's rank."""
    per = _per_slot(output.dtype) // slots.count // ALIGNED * ALIGNED
    pieces = [_pieces(part, per) for part in parts]
    results = _pieces(output, per)

    def fill(number: int, slot: Tensor) -> None:
        for rank in range(slots.count):
            if rank != slots.rank:
                piece = pieces[rank][number]
                slot[rank * per : rank * per + len(piece)].copy_(piece)

    start = slots.rank * per

    def use(number: int, found: Sequence[Tensor | None]) -> None:
        mine, result = pieces[slots.rank][number], results[number]
        stop = start + len(mine)
        reduction.combine([mine if each is None else each[start:stop] for each in found], result)

    return Streamed(slots, output.dtype, len(results), output.nbytes * slots.count, fill, use)


def all_gather(slots: Slots, outputs: Sequence[Tensor], part: Tensor) -> SlotOperation:
    """Return the all-gather of a flat tensor of bytes of each worker, which all have equally many."""
    pieces = _pieces(part, SLOT_BYTES)
    results = [_pieces(output, SLOT_BYTES) for output in outputs]
    own = outputs[slots.rank]
    if own.data_ptr() != part.data_ptr():
        own.copy_(part)

    def fill(number: int, slot: Tensor) -> None:
        piece = pieces[number]
        slot[: len(piece)].copy_(piece)

    def use(number: int, found: Sequence[Tensor | None]) -> None:
        for rank, each in enumerate(found):
            if each is not None:
                result = results[rank][number]
                result.copy_(each[: len(result)])

    return Streamed(slots, torch.uint8, len(pieces), len(part), fill, use)


def broadcast(slots: Slots, data: Tensor, root: int) -> SlotOperation:
    """Return the broadcast of a flat tensor of bytes."""
    pieces = _pieces(data, SLOT_BYTES)

    def fill(number: int, slot: Tensor) -> None:
        piece = pieces[number]
        slot[: len(piece)].copy_(piece)

    def use(number: int, found: Sequence[Tensor | None]) -> None:
        each = found[root]
        if each is not None:
            piece = pieces[number]
            piece.copy_(each[: len(piece)])

    return Streamed(slots, torch.uint8, len(pieces), len(data), fill, use, (root,))


def barrier(slots: Slots) -> SlotOperation:
    """Return a collective of one empty round: a worker ends it when all have begun it."""
    return Streamed(slots, torch.uint8, 1, 0, lambda number, slot: None, lambda number, found: None)


def _pieces(flat: Tensor, size: int) -> list[Tensor]:
    """Return pieces of at most `size` elements; none of an empty tensor."""
    return list(flat.split(size)) if len(flat) else []  # type: ignore[no-untyped-call]


def _per_slot(dtype: torch.dtype) -> int:
    return SLOT_BYTES // dtype.itemsize
