"""The workers of a group on one host: how they find each other's memory, wait for each other, and notice a death."""

from __future__ import annotations

import json
import os
import secrets
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shardwise.host_layers import host_grid
from shardwise.launch.scheduling import state_of
from shardwise.launch.shared_memory.segment import NONCE_BYTES, SharedSegment
from shardwise.launch.shared_memory.semaphore import Semaphore

LOOK_SECONDS = 0.1
"""Seconds of waiting after which a worker looks whether the other one still runs."""

NAMESPACES = ("pid", "net")
"""Namespaces of Linux that processes of one host share. Others of the network are taken for hosts: links between them
are what somebody wants to use."""


class Neighbours:
    """Memory of each worker of a group that is on this host, by its number among them.

    Attributes:
        rank: number of this process.
        segments: memory of each worker.

    Args:
        rank: number of this process.
        segments: memory of each worker.
        processes: process of each worker.
        names: rank of each worker in the group.
        seconds: time limit of the group's operations.
    """

    def __init__(
        self,
        rank: int,
        segments: Sequence[SharedSegment],
        processes: Sequence[int],
        names: Sequence[int],
        seconds: float,
    ) -> None:
        self.rank, self.segments = rank, tuple(segments)
        self._processes, self._names, self._seconds = tuple(processes), tuple(names), seconds

    @property
    def count(self) -> int:
        """Number of workers."""
        return len(self.segments)

    @property
    def others(self) -> list[int]:
        """Return the numbers of the others in ascending order."""
        return [rank for rank in range(self.count) if rank != self.rank]

    def wait(self, semaphore: Semaphore, rank: int) -> None:
        """Wait for a semaphore that worker `rank` posts.

        Raises:
            RuntimeError: it has left the group or ended, or did not post within the time limit of the group.
        """
        if semaphore.try_wait():
            return
        end = time.monotonic() + self._seconds
        while not semaphore.wait(LOOK_SECONDS):
            gone = self._is_gone(rank)
            if gone and semaphore.try_wait():  # it posted before it went
                return
            if gone:
                self.check(rank)
            if time.monotonic() > end:
                raise RuntimeError(f"worker {self._names[rank]} of the group did not answer within {self._seconds:g} s")

    def check(self, rank: int) -> None:
        """Raise RuntimeError if a worker has left the group or ended."""
        if self._is_gone(rank):
            raise RuntimeError(
                f"Connection closed: worker {self._names[rank]} of the group (process {self._processes[rank]}) is gone"
            )

    def leave(self) -> None:
        """Note that this worker leaves the group, so that the others do not wait for it any more."""
        self.segments[self.rank].leave()

    def _is_gone(self, rank: int) -> bool:
        return self.segments[rank].left or not _runs(self._processes[rank])


@dataclass(frozen=True)
class Met:
    """Workers of a group that share memory within each host.

    Attributes:
        neighbours: the workers of this host.
        hosts: ranks in the group of the workers of each host; equally many.
    """

    neighbours: Neighbours
    hosts: tuple[tuple[int, ...], ...]


def meet(store: Any, rank: int, count: int, seconds: float) -> Met | str:
    """Map the memory of all workers of a group that are on this host. Collective.

    Args:
        store: store of the group.
        rank: rank of this process in the group.
        count: number of workers.
        seconds: time limit of the group's operations.

    Returns:
        The workers. On all of them the reason why they do not share memory if one may not open the memory of another,
        and an empty text if hosts have one worker each, or not equally many.
    """
    nonce = secrets.token_bytes(NONCE_BYTES)
    with _created(count, nonce) as (segment, file):
        cards = _exchange(store, "card", rank, count, [*_host(), os.getpid(), file, nonce.hex()])
        hosts = host_grid([tuple(card[:-3]) for card in cards])
        if not hosts:
            return ""
        members = next(row for row in hosts if rank in row)
        own = members.index(rank)
        segments, problem = [segment] * len(members), ""
        try:
            for number, other in enumerate(members):
                if other != rank:
                    process, theirs, mark = cards[other][-3:]
                    segments[number] = SharedSegment.attach(process, theirs, count, bytes.fromhex(mark))
        except OSError as error:
            problem = f"worker {rank} cannot open the memory of another: {error}"
        # nobody closes a file before all have opened it
        problems = [each for each in _exchange(store, "mapped", rank, count, problem) if each]
    if problems:
        return str(problems[0])
    processes = [cards[member][-3] for member in members]
    return Met(Neighbours(own, segments, processes, members, seconds), hosts)


@contextmanager
def _created(count: int, nonce: bytes) -> Iterator[tuple[SharedSegment, int]]:
    segment, file = SharedSegment.create(count, nonce)
    try:
        yield segment, file
    finally:
        os.close(file)


def _exchange(store: Any, name: str, rank: int, count: int, value: Any) -> list[Any]:
    """All-gather a value of each worker through the store; return them by rank. Collective."""
    store.set(f"{name}-{rank}", json.dumps(value))
    return [json.loads(store.get(f"{name}-{other}")) for other in range(count)]


def _host() -> list[str]:
    """Return what all processes of one host have in common, and those of two do not."""
    boot = ""
    with suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return [socket.gethostname(), boot, *(_namespace(name) for name in NAMESPACES)]


def _namespace(name: str) -> str:
    try:
        return os.readlink(f"/proc/self/ns/{name}")
    except OSError:
        return ""


def _runs(process: int) -> bool:
    """Return whether a process has not ended; one that its parent has not asked about yet has."""
    return state_of(Path("/proc", str(process))) not in ("", "Z", "X")
