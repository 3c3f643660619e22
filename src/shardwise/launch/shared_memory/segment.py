"""The memory that each worker of a group owns and all of them map: what it writes for the others.

    nonce         16 bytes by which the others see that they have mapped the right memory, then one: its owner has left
    semaphores    four kinds for each other worker, see `SemaphoreKind`
    entries       for each other worker a ring of ENTRIES descriptions of messages to it
    slots         SLOTS pieces of SLOT_BYTES, for collectives
    arena         the messages themselves

The memory is an anonymous file (memfd_create(2)): it has no name that could be left behind when a worker is killed, and
the size of /dev/shm does not limit it. The others open it through /proc while its owner holds it open. Pages are
allocated when they are first written.
"""

from __future__ import annotations

import mmap
import os
from enum import IntEnum

import torch
from torch import Tensor

from shardwise.launch.shared_memory import semaphore
from shardwise.launch.shared_memory.semaphore import Semaphore

SLOTS, SLOT_BYTES = 4, 2**19
"""Number and size of a worker's slots: enough to write one while others read another, and little enough to stay in the
processor's cache."""

ENTRIES, ENTRY_BYTES = 1024, 64
"""Messages to one worker that may be under way at once, and the bytes of each one's description."""

ARENA_BYTES = 128 * 2**20
"""Bytes of a worker's messages that may be under way at once."""

NONCE_BYTES = 16


class SemaphoreKind(IntEnum):
    """Kind of a semaphore in the memory of a worker, one for each other worker.

    FILLED and FREE count the slots that the other may read and those that it has read. POSTED and TAKEN count the
    messages for the other and those that it has copied.
    """

    FILLED = 0
    FREE = 1
    POSTED = 2
    TAKEN = 3


class SharedSegment:
    """Mapped memory of one worker.

    Attributes:
        slots: its slots, one row each.
        arena: its messages.
    """

    def __init__(self, file: int, workers: int) -> None:
        entries = _entries_at(workers) + workers * ENTRIES * ENTRY_BYTES
        start = -(-entries // mmap.PAGESIZE) * mmap.PAGESIZE
        self.memory = mmap.mmap(file, start + SLOTS * SLOT_BYTES + ARENA_BYTES)
        everything = torch.frombuffer(self.memory, dtype=torch.uint8)
        self._workers, self._address = workers, everything.data_ptr()
        self.slots: Tensor = everything[start : start + SLOTS * SLOT_BYTES].view(SLOTS, SLOT_BYTES)
        self.arena: Tensor = everything[start + SLOTS * SLOT_BYTES :]

    @classmethod
    def create(cls, workers: int, nonce: bytes) -> tuple[SharedSegment, int]:
        """Create the memory of this process, and return it with its file, to be closed once all have mapped it."""
        file = os.memfd_create("shardwise", os.MFD_CLOEXEC)
        entries = _entries_at(workers) + workers * ENTRIES * ENTRY_BYTES
        os.ftruncate(file, -(-entries // mmap.PAGESIZE) * mmap.PAGESIZE + SLOTS * SLOT_BYTES + ARENA_BYTES)
        segment = cls(file, workers)
        for worker in range(workers):
            for kind in SemaphoreKind:
                segment.semaphore(kind, worker).initialize(SLOTS if kind is SemaphoreKind.FREE else 0)
        segment.memory[:NONCE_BYTES] = nonce
        return segment, file

    @classmethod
    def attach(cls, process: int, file: int, workers: int, nonce: bytes) -> SharedSegment:
        """Map the memory of another process. Raises OSError if it cannot be opened, or is not what was meant."""
        own = os.open(f"/proc/{process}/fd/{file}", os.O_RDWR | os.O_CLOEXEC)
        try:
            segment = cls(own, workers)
        except ValueError as error:  # the file is smaller
            raise OSError(str(error)) from error
        finally:
            os.close(own)
        if segment.memory[:NONCE_BYTES] != nonce:
            raise OSError(f"process {process} is another one than meant")
        return segment

    @property
    def left(self) -> bool:
        """Return whether its owner has left the group."""
        return self.memory[NONCE_BYTES] != 0

    def leave(self) -> None:
        """Note that its owner leaves the group, so that nobody waits for it any more."""
        self.memory[NONCE_BYTES] = 1

    def semaphore(self, kind: SemaphoreKind, worker: int) -> Semaphore:
        """Return the semaphore of a kind for another worker of the group."""
        return Semaphore(self._address + _semaphore_at(kind, worker, self._workers))

    def entry_at(self, worker: int, number: int) -> int:
        """Return the position in `memory` of the description of message `number` to a worker."""
        return _entries_at(self._workers) + (worker * ENTRIES + number % ENTRIES) * ENTRY_BYTES


def _semaphore_at(kind: int, worker: int, workers: int) -> int:
    return semaphore.BYTES * (1 + kind * workers + worker)


def _entries_at(workers: int) -> int:
    return _semaphore_at(len(SemaphoreKind), 0, workers)
