"""Parent's side of the sockets to its workers: sends each the function to call, and notes answers and failures.

Frames on the Unix socket between one worker and its parent, in this order:

    worker  {"rank"}                                   greeting
    parent  {"path", "threads", "gpus", "linger", ...}  import path, intra-op threads, whether to use GPUs
    parent  function and arguments                     by cloudpickle: to our own child, never through a file
    worker  {"waiting": value}                         at its gate, any number of times; see `launch.gate`
    parent  an empty frame                             opens the gate
    worker  {"beside": folder}, the work, a socket     a process that is to run beside the parent; see `launch.beside`
    both    what `launch.regroup` says                 where killed workers are started again
    worker  {"time", "returned"} and the result, or {"time", "error", "message", "traceback"}

A worker whose socket closes without an answer has died. A worker that reports an error lingers before it ends, so that
the parent does not stop the others yet: a worker that ends within that time ended by itself, and may be the cause.
"""

from __future__ import annotations

import contextlib
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
from multiprocessing.reduction import recv_handle
from pathlib import Path
from typing import Any

from shardwise.launch.beside import Beside

LINGER_SECONDS = 0.5
"""Seconds between a worker's report of an error and its end."""

LONGEST_ADDRESS = 100
"""Largest number of bytes in the path of a Unix socket that every system accepts."""


@dataclass(frozen=True, slots=True)
class EarlyExit:
    """End of a worker before its work was done.

    Attributes:
        rank: rank of the worker.
        time: time of its report, or of its closed connection, in seconds of the machine's monotonic clock.
        report: its error report, with keys error, message, traceback; None if it died without one.
    """

    rank: int
    time: float
    report: dict[str, Any] | None


class Switchboard:
    """Server of the workers' sockets, in a thread that runs until `close`.

    Attributes:
        address: path of the socket that workers connect to.
        endings: workers that failed or died.
        finished: ranks of workers that have answered.
        waiting: rank -> the value with which it came to its gate, where it waits.
        restartable: ranks of workers that can go on if another one is killed.
        generation: number of times that workers were started again.
        beside: processes that run beside this one for the workers.
        returned: result of rank 0 as pickled by cloudpickle; None until rank 0 has answered.
    """

    def __init__(self, setup: dict[str, Any], work: bytes) -> None:
        self._folder = tempfile.mkdtemp(prefix="shardwise-", dir=_socket_parent())
        shown = {**setup, "linger": LINGER_SECONDS, "folder": self._folder}
        self._setup, self._work = shown, work
        self.address = str(Path(self._folder) / "socket")
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(self.address)  # the folder is ours alone (mkdtemp), so nobody else can connect
        self._listener.listen(1024)
        self._woken, self._wake = socket.socketpair()
        self._ranks: dict[Connection, int] = {}
        self._answered: list[Connection] = []
        self.endings: list[EarlyExit] = []
        self.finished: set[int] = set()
        self.waiting: dict[int, dict[str, Any]] = {}
        self.restartable: set[int] = set()
        self.generation = 0
        self.beside: list[Beside] = []
        self.returned: bytes | None = None
        self._thread = threading.Thread(target=self._serve, name="shardwise-switchboard", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Stop serving and close all connections, upon which a worker that is still alive ends itself."""
        self._wake.send(b"x")
        self._thread.join()
        for connection in (*self._ranks, *self._answered):
            connection.close()
        for each in self.beside:
            each.close()
        for end in (self._listener, self._woken, self._wake):
            end.close()
        shutil.rmtree(self._folder, ignore_errors=True)

    def open_gates(self) -> None:
        """Let all workers that wait at their gates go on."""
        there = set(self.waiting)
        self.waiting.clear()  # before they can come back
        self._send(b"", there)

    def replace(self, rank: int) -> None:
        """Forget a worker that was killed, and tell the others that it is started again."""
        self.endings = [each for each in self.endings if each.rank != rank]
        self.restartable.clear()
        self.generation += 1
        self._tell({"lost": rank}, {rank})

    def _tell(self, message: dict[str, Any], but: Collection[int]) -> None:
        """Send a message to all workers, but for some."""
        self._send(json.dumps(message).encode(), set(self._ranks.values()).difference(but))

    def _send(self, frame: bytes, ranks: Collection[int]) -> None:
        """Send a frame to workers."""
        for connection, rank in list(self._ranks.items()):
            if rank in ranks:
                with contextlib.suppress(OSError):  # a worker that has died is noticed elsewhere
                    connection.send_bytes(frame)

    def settle(self, ended: Collection[int], seconds: float = 5.0) -> None:
        """Wait at most `seconds` until the last frames of the workers in `ended` have been read."""
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
            connection.send_bytes(json.dumps({**self._setup, "generation": self.generation}).encode())
            connection.send_bytes(self._work)
        except (EOFError, OSError):
            self._hang_up(connection, None)

    def _hear(self, connection: Connection) -> None:
        try:
            answer = json.loads(connection.recv_bytes())
            if "waiting" in answer:
                self.waiting[self._ranks[connection]] = answer["waiting"]
                return
            if "restartable" in answer:
                self.restartable.add(self._ranks[connection])
                return
            if "ready" in answer:
                self._tell({"regroup": self.generation}, {self._ranks[connection]})
                return
            if "beside" in answer:
                work, listener = connection.recv_bytes(), socket.socket(fileno=recv_handle(connection))
                self.beside.append(Beside.of_work(work, listener, answer["beside"]))
                return
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
        self._answered.append(connection)  # stays open: closing it would make the worker end itself
        self.finished.add(rank)

    def _hang_up(self, connection: Connection, report: dict[str, Any] | None) -> None:
        rank = self._ranks.pop(connection, None)
        connection.close()
        if rank is not None:
            self.endings.append(EarlyExit(rank, report["time"] if report else time.monotonic(), report))


def _socket_parent() -> str | None:
    """Return the parent folder of the socket's folder: /tmp if the default path is too long for a socket, else None.

    None selects the default folder for temporary files.
    """
    return None if len(os.fsencode(tempfile.gettempdir())) + 32 < LONGEST_ADDRESS else "/tmp"
