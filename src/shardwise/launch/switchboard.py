"""The parent's end of its workers: hands each the function to call, and notes what they answer and who ended first.

Frames on the Unix socket between one worker and its parent, in this order:

    worker  {"rank"}                                   it is there
    parent  {"path", "threads", "gpus", "linger", ...}  where to import from, threads to compute with, GPUs or none
    parent  function and arguments                     by cloudpickle: to our own child, never through a file
    worker  {"time", "returned"} and what was returned    or    {"time", "error", "message", "traceback"}

A worker whose socket closes without an answer died. A worker that reports an error lingers before it ends, so that the
agent does not stop the others yet: what is seen to end within that time ended by itself, and may be the cause.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

LINGER_SECONDS = 0.5
"""Seconds between a worker's report of an error and its end."""

LONGEST_ADDRESS = 100
"""Bytes that a Unix socket's path may have, on every system."""


@dataclass(frozen=True, slots=True)
class Ending:
    """How a worker ended before its work was done.

    Attributes:
        rank: its number.
        time: when it reported or was seen to be gone, in seconds of the machine's monotonic clock.
        report: what it said: keys error, message, traceback; None: it died without a word.
    """

    rank: int
    time: float
    report: dict[str, Any] | None


class Switchboard:
    """Serves the workers from a thread, until `close`.

    Attributes:
        address: path of the socket that workers connect to.
        endings: workers that failed or died.
        finished: ranks of workers that have answered.
        returned: what rank 0 returned, as cloudpickle wrote it; None before.
    """

    def __init__(self, setup: dict[str, Any], work: bytes) -> None:
        self._folder = tempfile.mkdtemp(prefix="shardwise-", dir=_socket_parent())
        shown = {**setup, "linger": LINGER_SECONDS, "folder": self._folder}
        self._setup, self._work = json.dumps(shown).encode(), work
        self.address = str(Path(self._folder) / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)  # the folder is ours alone (mkdtemp), so nobody else can connect
        self._listener.listen(1024)
        self._woken, self._wake = socket.socketpair()
        self._ranks: dict[Connection, int] = {}
        self._answered: list[Connection] = []
        self.endings: list[Ending] = []
        self.finished: set[int] = set()
        self.returned: bytes | None = None
        self._thread = threading.Thread(target=self._serve, name="shardwise-switchboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stops serving and hangs up: a worker that is still there then ends itself."""
        self._wake.send(b"x")
        self._thread.join()
        for connection in (*self._ranks, *self._answered):
            connection.close()
        for end in (self._listener, self._woken, self._wake):
            end.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def settle(self, ended: Collection[int], seconds: float = 5.0) -> None:
        """Wait, `seconds` at most, until the last words of the workers that have `ended` have been heard."""
        deadline = time.monotonic() + seconds
        while any(rank in ended for rank in list(self._ranks.values())) and time.monotonic() < deadline:
            time.sleep(0.005)

    def _serve(self) -> None:
        while True:
            ready = wait([self._listener, self._woken, *self._ranks])
            if self._woken in ready:
                return
            for end in ready:
                if isinstance(end, Connection):
                    self._hear(end)
                else:
                    self._welcome()

    def _welcome(self) -> None:
        connection = Connection(self._listener.accept()[0].detach())
        try:
            self._ranks[connection] = json.loads(connection.recv_bytes())["rank"]
            connection.send_bytes(self._setup)
            connection.send_bytes(self._work)
        except (EOFError, OSError):
            self._hang_up(connection, None)

    def _hear(self, connection: Connection) -> None:
        try:
            answer = json.loads(connection.recv_bytes())
            if "error" in answer:
                self._hang_up(connection, answer)
                return
            returned = connection.recv_bytes()
        except (EOFError, OSError):
            self._hang_up(connection, None)
            return
        rank = self._ranks.pop(connection)
        if rank == 0:
            self.returned = returned
        self._answered.append(connection)  # from here on its end means nothing
        self.finished.add(rank)

    def _hang_up(self, connection: Connection, report: dict[str, Any] | None) -> None:
        rank = self._ranks.pop(connection, None)
        connection.close()
        if rank is not None:
            self.endings.append(Ending(rank, report["time"] if report else time.monotonic(), report))


def _socket_parent() -> str | None:
    """Where the socket's folder goes: the usual place for temporary files unless its path is too long for a socket."""
    return None if len(os.fsencode(tempfile.gettempdir())) + 32 < LONGEST_ADDRESS else "/tmp"
