"""Log of a parameter server on disk: what it has acknowledged survives its death.

    state-N     the whole state of the server, one frame; written beside and renamed, so that it is whole or absent
    events-N    the events since then, one frame each, in the order in which they took effect

An event is written before it is acknowledged, so the log holds everything that a worker was told is done. A process
that is killed leaves at most one event that is not whole, at the end; nobody was told of it, and it is cut off. The log
protects from the death of the process, not of the host: the files are not forced to the disk.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path

from shardwise.parallel.servers.frames import Fill, Frame, parts_of_frame, read_frame

UNLIMITED = 2**62
"""Limit of frames that this process has written itself."""

_NUMBERED = re.compile(r"(state|events)-(\d+)")


class Journal:
    """Log in a folder, which it creates.

    Attributes:
        event_bytes: bytes of the events since the last state.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._number = max((number for kind, number in self._files() if kind == "state"), default=0)
        self._events = os.open(self._path("events", self._number), os.O_RDWR | os.O_CREAT, 0o600)
        self.event_bytes = 0

    def replay(self) -> Iterator[Frame]:
        """Yield the last state, if there is one, then every whole event since; cut off what is not whole."""
        state = self._path("state", self._number)
        if state.exists():
            descriptor = os.open(state, os.O_RDONLY)
            try:
                yield read_frame(_filling(descriptor), UNLIMITED)
            finally:
                os.close(descriptor)
        os.lseek(self._events, 0, os.SEEK_SET)
        self.event_bytes = 0
        while True:
            try:
                event = read_frame(_filling(self._events), UNLIMITED)
            except EOFError:
                break
            yield event
            self.event_bytes = os.lseek(self._events, 0, os.SEEK_CUR)
        os.ftruncate(self._events, self.event_bytes)
        os.lseek(self._events, self.event_bytes, os.SEEK_SET)

    def append(self, event: Frame) -> None:
        """Write an event; it survives this process from then on. Raises OSError, and leaves no part of the event."""
        try:
            self.event_bytes += _write(self._events, event)
        except OSError:
            os.ftruncate(self._events, self.event_bytes)
            os.lseek(self._events, self.event_bytes, os.SEEK_SET)
            raise

    def begin(self, state: Frame) -> None:
        """Write the whole state, and begin an empty list of events after it."""
        number = self._number + 1
        part = self._folder / "part"
        descriptor = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        try:
            _write(descriptor, state)
        finally:
            os.close(descriptor)
        part.replace(self._path("state", number))
        os.close(self._events)
        self._number = number
        self._events = os.open(self._path("events", number), os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o600)
        self.event_bytes = 0
        for kind, other in self._files():
            if other < number:
                self._path(kind, other).unlink(missing_ok=True)

    def close(self) -> None:
        """Close the file of events."""
        os.close(self._events)

    def _path(self, kind: str, number: int) -> Path:
        return self._folder / f"{kind}-{number}"

    def _files(self) -> list[tuple[str, int]]:
        found = [_NUMBERED.fullmatch(path.name) for path in self._folder.iterdir()]
        return [(match[1], int(match[2])) for match in found if match]


def _write(descriptor: int, frame: Frame) -> int:
    """Write a frame, and return its number of bytes."""
    total = 0
    for part in parts_of_frame(frame):
        total += len(part)
        while part:
            part = part[os.write(descriptor, part) :]
    return total


def _filling(descriptor: int) -> Fill:
    def fill(memory: memoryview) -> None:
        while memory:
            count = os.readv(descriptor, [memory])
            if not count:
                raise EOFError("the file ends within a frame")
            memory = memory[count:]

    return fill
