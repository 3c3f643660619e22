"""Messages from one worker of a group to another: copied into memory of the sender, and out of it by the receiver.

A message has a tag. The receiver may ask for messages in another order than they are sent: one that comes before it is
asked for is copied aside. So a message is on its way once its sender has called, and nobody has to wait for it to be
received, except for room: ARENA_BYTES may be under way.

A message is sent in pieces, so that the receiver copies one while the sender writes the next. The description of a
piece has its tag, the bytes of the whole message, and the position and size of the piece in the sender's arena.
"""

from __future__ import annotations

import struct
import threading
import time
from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from shardwise.launch.shared_memory.neighbours import Neighbours
from shardwise.launch.shared_memory.segment import ARENA_BYTES, ENTRIES, SemaphoreKind

PIECE_BYTES = 4 * 2**20
ALIGNED = 64
"""Bytes of which the positions in an arena are multiples: a cache line."""

ROOM_SECONDS = 0.0005
"""Seconds between two looks for room in a full arena."""

_ENTRY = struct.Struct("qqqq")


@dataclass(eq=False, slots=True)
class Sending:
    """Message that is sent to a worker: `left` has had no room yet, and it is `done` once nothing is left."""

    left: Tensor
    other: int
    tag: int
    size: int
    begun: bool = False
    done: bool = False


@dataclass(eq=False, slots=True)
class Receiving:
    """Message that is asked for, and how many bytes of it have come."""

    target: Tensor
    tag: int
    came: int = 0
    done: bool = False


class Outbox:
    """Messages from this worker to all others of a group."""

    def __init__(self, neighbours: Neighbours) -> None:
        own = neighbours.segments[neighbours.rank]
        self._neighbours, self._segment = neighbours, own
        self._posted = [own.semaphore(SemaphoreKind.POSTED, other) for other in range(neighbours.count)]
        self._taken = [own.semaphore(SemaphoreKind.TAKEN, other) for other in range(neighbours.count)]
        self._sent = [0] * neighbours.count
        self._places: list[deque[tuple[int, int]]] = [deque() for _ in range(neighbours.count)]
        self._waiting: list[deque[Sending]] = [deque() for _ in range(neighbours.count)]
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._closed = False

    def send(self, data: Tensor, other: int, tag: int) -> Sending:
        """Send bytes to another worker, as far as there is room; a thread sends the rest."""
        sending = Sending(data, other, tag, len(data))
        with self._lock:
            self._waiting[other].append(sending)
            self._proceed(other)
            if not sending.done and self._thread is None:
                self._thread = threading.Thread(target=self._send_rest, name="shardwise-messages", daemon=True)
                self._thread.start()
        return sending

    def wait(self, sending: Sending) -> None:
        """Wait until the memory of a message may be used again. Raises RuntimeError if its receiver is gone."""
        while not sending.done:
            time.sleep(ROOM_SECONDS)
            self._neighbours.check(sending.other)

    def close(self) -> None:
        """End the thread that sends what has had no room."""
        self._closed = True

    def _send_rest(self) -> None:
        while True:
            with self._lock:
                for other in range(len(self._waiting)):
                    self._proceed(other)
                if self._closed or not any(self._waiting):
                    self._thread = None
                    return
            time.sleep(ROOM_SECONDS)

    def _proceed(self, other: int) -> None:
        """Send what there is room for to a worker."""
        waiting = self._waiting[other]
        while waiting:
            sending = waiting[0]
            while len(sending.left) or not sending.begun:
                piece = sending.left[:PIECE_BYTES]
                position = self._room(len(piece), other)
                if position is None:
                    return
                self._segment.arena[position : position + len(piece)].copy_(piece)
                self._post(other, sending, position, len(piece))
                sending.left, sending.begun = sending.left[PIECE_BYTES:], True
            waiting.popleft()
            sending.done = True

    def _post(self, other: int, sending: Sending, position: int, size: int) -> None:
        where = self._segment.entry_at(other, self._sent[other])
        _ENTRY.pack_into(self._segment.memory, where, sending.tag, sending.size, position, size)
        self._sent[other] += 1
        self._places[other].append((position, position + size))
        self._posted[other].post()

    def _room(self, size: int, other: int) -> int | None:
        """Return the first position in the arena with room for a piece. Returns None if there is none now."""
        for taken, places in zip(self._taken, self._places, strict=True):
            while places and taken.try_wait():
                places.popleft()
        if len(self._places[other]) >= ENTRIES:
            return None
        position = 0
        for start, stop in sorted(place for places in self._places for place in places):
            if start - position >= size:
                break
            position = max(position, -(-stop // ALIGNED) * ALIGNED)
        return position if position + size <= ARENA_BYTES else None


class Inbox:
    """Messages from one other worker of a group to this one."""

    def __init__(self, neighbours: Neighbours, other: int) -> None:
        self._neighbours, self._other = neighbours, other
        self._segment = neighbours.segments[other]
        self._posted = self._segment.semaphore(SemaphoreKind.POSTED, neighbours.rank)
        self._taken = self._segment.semaphore(SemaphoreKind.TAKEN, neighbours.rank)
        self._read = 0
        self._asked: list[Receiving] = []
        self._aside: list[Receiving] = []
        self._current: Receiving | None = None
        self._lock, self._reading = threading.Lock(), threading.Lock()

    def ask(self, target: Tensor, tag: int) -> Receiving:
        """Ask for the next message with a tag, to be copied to `target`."""
        receiving = Receiving(target, tag)
        with self._lock:
            found = next((each for each in self._aside if each.tag == tag and each.done), None)
            if found is None:
                self._asked.append(receiving)
                return receiving
            self._aside.remove(found)
        _check(len(found.target), len(target))
        target.copy_(found.target)
        receiving.done = True
        return receiving

    def wait(self, receiving: Receiving) -> None:
        """Receive messages until one that was asked for is complete. Raises RuntimeError if it has another size."""
        while not receiving.done:
            with self._reading:
                if not receiving.done:
                    self._neighbours.wait(self._posted, self._other)
                    self._take()

    def poll(self, receiving: Receiving) -> bool:
        """Receive what has come, and return whether a message is complete."""
        if self._reading.acquire(blocking=False):
            try:
                while not receiving.done and self._posted.try_wait():
                    self._take()
            finally:
                self._reading.release()
        return receiving.done

    def _take(self) -> None:
        """Copy one piece to its message."""
        segment = self._segment
        where = segment.entry_at(self._neighbours.rank, self._read)
        tag, total, position, size = _ENTRY.unpack_from(segment.memory, where)
        self._read += 1
        if self._current is None:
            self._current = self._begin(tag, total)
        current = self._current
        current.target[current.came : current.came + size].copy_(segment.arena[position : position + size])
        current.came += size
        if current.came == total:
            self._current = None
        self._taken.post()
        if current.came == total:
            self._end(current)

    def _begin(self, tag: int, total: int) -> Receiving:
        with self._lock:
            found = next((each for each in self._asked if each.tag == tag), None)
            if found is not None:
                _check(total, len(found.target))
                self._asked.remove(found)
                return found
            aside = Receiving(torch.empty(total, dtype=torch.uint8), tag)
            self._aside.append(aside)
            return aside

    def _end(self, current: Receiving) -> None:
        """Mark a message as complete, and hand one that was put aside to a receiver that has asked for it meanwhile."""
        with self._lock:
            current.done = True
            if not any(each is current for each in self._aside):
                return
            asked = next((each for each in self._asked if each.tag == current.tag), None)
            if asked is None:
                return
            self._asked.remove(asked)
            self._aside.remove(current)
        _check(len(current.target), len(asked.target))
        asked.target.copy_(current.target)
        asked.done = True


def _check(sent: int, expected: int) -> None:
    if sent != expected:
        raise RuntimeError(f"a message of {sent} bytes came where {expected} are expected")
