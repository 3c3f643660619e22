"""Process of one worker that an engine's own worker (an actor of Ray) starts, watches and ends.

The engine's worker passes on what the process writes, line by line; the driver prints the lines and keeps the roll.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import IO

from shardwise.launch.exit import die_with_parent
from shardwise.launch.ranks import ENGINE, LOOPBACK, STORE_DESCRIPTOR, is_passed_on

OUTPUT, ERRORS = 1, 2
"""Descriptors of the two streams of a process."""

Line = tuple[int, str]
"""Stream and text of a line that a worker has written."""

FOLLOW_SECONDS = 5.0
"""Seconds that the other workers get to end by themselves after one has failed."""


class Member:
    """Process of one worker."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._listener: socket.socket | None = None
        self._lines: SimpleQueue[Line] = SimpleQueue()
        self._readers: list[threading.Thread] = []

    def listen(self, beyond: bool) -> int:
        """Open a socket for the job's store at a port that the system chooses, and return the port.

        Args:
            beyond: True if workers on other hosts must reach it.
        """
        self._listener = socket.socket()
        self._listener.bind(("" if beyond else LOOPBACK, 0))
        self._listener.listen(1024)
        return int(self._listener.getsockname()[1])

    def start(self, command: Sequence[str], environment: Mapping[str, str], folder: str) -> None:
        """Start the process in `folder`, if there is one on this host, with these variables beside its own."""
        kept: list[int] = []
        own = dict(environment)
        if self._listener is not None:
            kept = [self._listener.fileno()]
            own[STORE_DESCRIPTOR] = str(kept[0])
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **own},
            cwd=folder if Path(folder).is_dir() else None,
            pass_fds=kept,
            start_new_session=True,
            preexec_fn=die_with_parent,
        )
        if self._listener is not None:
            self._listener.close()
        for number, stream in ((OUTPUT, self._process.stdout), (ERRORS, self._process.stderr)):
            assert stream is not None
            reader = threading.Thread(target=self._read, args=(number, stream), daemon=True)
            reader.start()
            self._readers.append(reader)

    def take(self) -> tuple[list[Line], int | None]:
        """Return the lines since the last call, and the exit status; None until the process and its streams ended."""
        assert self._process is not None
        status = None if any(reader.is_alive() for reader in self._readers) else self._process.poll()
        lines: list[Line] = []
        with contextlib.suppress(Empty):
            while True:
                lines.append(self._lines.get_nowait())
        return lines, status

    def send(self, number: int) -> None:
        """Send the process a signal."""
        if self._process is not None:
            self._process.send_signal(number)

    def kill(self) -> None:
        """End the process, with all that it started, and wait until it is gone."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()

    def _read(self, number: int, stream: IO[bytes]) -> None:
        for line in stream:
            self._lines.put((number, line.decode(errors="replace")))


class Roll:
    """Roll of the workers of a job, in the driver: prints their lines, and knows which failed first."""

    def __init__(self, workers: int) -> None:
        self._workers = workers
        self._ended: dict[int, int] = {}
        self._failed: tuple[int, float] | None = None

    @property
    def ended(self) -> set[int]:
        """Return the ranks that have ended."""
        return set(self._ended)

    def note(self, rank: int, lines: Sequence[Line], status: int | None) -> None:
        """Print the lines of a worker, and note its exit status once it has one."""
        for number, text in lines:
            stream = sys.stdout if number == OUTPUT else sys.stderr
            stream.write(text)
            stream.flush()
        if status is None or rank in self._ended:
            return
        self._ended[rank] = status
        if status and self._failed is None:
            self._failed = (rank, time.monotonic())
            if status < 0:
                sys.stderr.write(f"shardwise: worker {rank} was killed by {signal.Signals(-status).name}\n")

    def lose(self, rank: int, reason: str) -> None:
        """Note that a worker's host or its engine's worker is gone."""
        if rank not in self._ended:
            sys.stderr.write(f"shardwise: worker {rank} is lost: {reason}\n")
            self.note(rank, (), 1)

    def status(self) -> int | None:
        """Return the exit status of the job, that of the worker that failed first. Returns None while it runs."""
        if self._failed is not None:
            rank, when = self._failed
            if len(self._ended) == self._workers or time.monotonic() > when + FOLLOW_SECONDS:
                return 1 if self._ended[rank] < 0 else self._ended[rank]
            return None
        return 0 if len(self._ended) == self._workers else None


def member_environment(
    engine: str, rank: int, hosts: Sequence[str], address: str, port: int, shared: Mapping[str, str]
) -> dict[str, str]:
    """Return the environment of a worker, for `launch.context`.

    Args:
        engine: name of the engine.
        rank: its rank.
        hosts: name of the host of each rank.
        address: host of the store.
        port: TCP port of the store.
        shared: variables of the driver's environment, from `shared_environment`.
    """
    here = [other for other, host in enumerate(hosts) if host == hosts[rank]]
    return dict(shared) | {
        ENGINE: engine,
        "RANK": str(rank),
        "WORLD_SIZE": str(len(hosts)),
        "LOCAL_RANK": str(here.index(rank)),
        "LOCAL_WORLD_SIZE": str(len(here)),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def shared_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Return the variables that workers get from the driver."""
    return {name: value for name, value in environment.items() if is_passed_on(name)}
