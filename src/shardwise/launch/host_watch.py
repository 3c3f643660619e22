"""Watch over the hosts of a job: one that vanishes, or a worker there that is killed, ends the run on every host.

    worker 1 ──┐
    worker 2 ──┼── one TCP connection each ──▶ hub, a thread of the worker that keeps the store (of torchrun: rank 0)
    worker 3 ──┘

Over a connection goes a greeting, nothing for as long as the job runs, and a farewell. In between the kernels of both
hosts ask each other whether it still stands (TCP keepalive, RFC 9293 3.8.4), which no long computation delays. If it
ends without a farewell, the process at its other end was killed. If nobody answers, its host or the link to it is gone.
Links between two hosts that both still reach the hub are left to `launch.watch`.

Frames are lines of JSON:

    worker  {"token", "rank", "host"}     greeting; the token is in the job's store
    both    {"bye": true}                 farewell: what follows is no loss
    hub     {"gone": true}                another host is lost, and the hub has said so
"""

from __future__ import annotations

import contextlib
import hmac
import json
import os
import selectors
import signal
import socket
import sys
import threading
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from os import _exit
from typing import TYPE_CHECKING, Any, NoReturn

from shardwise.errors import RequestError
from shardwise.launch.board import AFTER_SECONDS, OutOfReach, StoreBoard
from shardwise.launch.ranks import RankContext

if TYPE_CHECKING:
    from shardwise.launch.meeting import Meeting

HOST_SECONDS = 30.0
"""Seconds without any answer after which a host counts as gone."""

HOST_SETTING = "SHARDWISE_HOST_SECONDS"
"""Environment variable that overrides HOST_SECONDS."""

LEAST_SECONDS, PROBES = 5.0, 10
"""Shortest time that may be set, and number of questions of a kernel in that time."""

GATHER_SECONDS = 0.5
"""Seconds after a loss in which the hub notes further ones, so that it can say which workers a host had."""

GREETING_BYTES = 4096
"""Largest size of a greeting."""

SPARE_SECONDS = 15.0
"""Seconds that a worker may take to say what is lost, at most: the job's store may be out of reach too."""

AGENT_SECONDS = 10.0
"""Seconds that torchrun's agent gets to end after its workers have."""

BROKEN = ("gloo/transport", "NCCL", "Connection closed by peer", "Connection reset by peer")
"""Words in the error of a collective whose connection to another worker broke."""

SPARE_CONNECTIONS = 64
"""Number of connections without a greeting that the hub has open at most, beside one for each worker."""

PLACE = "hub"
"""Name in the job's store under which the hub's place stands."""


@dataclass(frozen=True, slots=True)
class Peer:
    """Worker at the other end of a connection: its rank, and the name of its host."""

    rank: int
    host: str


def host_seconds() -> float:
    """Return the seconds after which a silent host counts as gone. Raises RequestError if the setting is wrong."""
    text = os.environ.get(HOST_SETTING, str(HOST_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not LEAST_SECONDS <= seconds < 1e6:
        raise RequestError(f"{HOST_SETTING}={text}: must be a number of seconds, at least {LEAST_SECONDS:g}")
    return seconds


_watch: HostWatch | None = None


def settle(context: RankContext, meeting: Meeting, board: StoreBoard) -> None:
    """Let this worker take part in the watch until it leaves; does nothing if all workers are on one host.

    Args:
        context: rank of this process.
        meeting: meeting point of the job.
        board: board in the job's store, on which it is noted that a worker has told an error.

    Raises:
        RequestError: the setting is wrong, or the hub cannot be reached.
    """
    global _watch
    if not context.one_host:
        _watch = HostWatch(context, board)
        _watch.begin(meeting)


def leave() -> None:
    """Say farewell: from now on the end of this process is no loss to the others."""
    if _watch is not None:
        _watch.leave()


def await_loss(error: BaseException) -> None:
    """Give the watch time to end this process with a better reason than that a connection to another worker broke.

    Returns at once if `error` is another one, and as soon as a worker has told an error.
    """
    if _watch is not None and any(words in str(error) for words in BROKEN):
        _watch.await_loss()


class HostWatch:
    """One worker's part in the watch, in a thread that runs until `leave`.

    Attributes:
        noticed: set once a loss is noticed.
    """

    def __init__(self, context: RankContext, board: StoreBoard) -> None:
        self._context, self._board, self._seconds = context, board, host_seconds()
        self._selector = selectors.DefaultSelector()
        self._listener: socket.socket | None = None
        self._token = os.urandom(16).hex()
        self._peers: dict[socket.socket, Peer] = {}
        self._left = False
        self.noticed = threading.Event()

    def begin(self, meeting: Meeting) -> None:
        """Become the hub or connect to it, and start the thread. Raises RequestError if the hub cannot be reached."""
        if self._context.keeps_store or (self._context.elastic and self._context.rank == 0):
            self._open(meeting)
        else:
            self._join(meeting)
        threading.Thread(target=self._run, name="shardwise-host-watch", daemon=True).start()

    def leave(self) -> None:
        """Say farewell to all peers."""
        self._left = True
        for connection in list(self._peers):
            _send(connection, {"bye": True})

    def await_loss(self) -> None:
        """Wait until the watch ends this process, or a worker has told an error; at most the time of a silent host."""
        end = time.monotonic() + self._seconds + SPARE_SECONDS
        while time.monotonic() < end:
            if self.noticed.wait(GATHER_SECONDS):
                time.sleep(SPARE_SECONDS)  # it ends this process sooner
            with contextlib.suppress(OutOfReach):
                if self._board.get("said") or self._board.get("hang"):
                    return

    # ---- begin ----

    def _open(self, meeting: Meeting) -> None:
        """Become the hub, and put its place into the job's store."""
        six = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if six else socket.AF_INET
        self._listener = socket.create_server(("", 0), family=family, backlog=1024, dualstack_ipv6=six)
        self._attend(self._listener)
        place = {"port": self._listener.getsockname()[1], "token": self._token, **self._greeting()}
        meeting.store.set(PLACE, json.dumps(place))

    def _join(self, meeting: Meeting) -> None:
        """Connect to the hub, and greet it."""
        place = json.loads(meeting.store.get(PLACE))
        address = (meeting.address, place["port"])
        try:
            connection = socket.create_connection(address, timeout=self._seconds)
        except OSError as error:
            raise RequestError(
                f"rank {self._context.rank} cannot reach rank {place['rank']} at {address[0]}:{address[1]} ({error}): "
                "the hosts of a job must reach each other at all ports that systems hand out by themselves"
            ) from error
        _send(connection, {"token": place["token"], **self._greeting()})
        _keep_asking(connection, self._seconds)
        self._attend(connection)
        self._peers[connection] = Peer(place["rank"], place["host"])

    def _greeting(self) -> dict[str, Any]:
        return {"rank": self._context.rank, "host": socket.gethostname()}

    def _attend(self, end: socket.socket) -> None:
        end.setblocking(False)
        self._selector.register(end, selectors.EVENT_READ)

    # ---- while the job runs ----

    def _run(self) -> None:
        """Wait for a loss, and a moment more for others; then end this process."""
        lost: dict[Peer, bool] = {}
        end: float | None = None
        while end is None or time.monotonic() < end:
            for key, _ in self._selector.select(None if end is None else GATHER_SECONDS):
                assert isinstance(key.fileobj, socket.socket)
                if key.fileobj is self._listener:
                    self._welcome(self._listener)
                else:
                    lost |= self._hear(key.fileobj)
            if lost and end is None:
                self.noticed.set()
                end = time.monotonic() + GATHER_SECONDS
        if not self._left:
            self._end(lost)

    def _welcome(self, listener: socket.socket) -> None:
        """Accept a connection, unless there are many of which no greeting has come."""
        with contextlib.suppress(OSError):
            connection, _ = listener.accept()
            if len(self._selector.get_map()) > len(self._peers) + self._context.workers + SPARE_CONNECTIONS:
                connection.close()
                return
            _keep_asking(connection, self._seconds)
            self._attend(connection)

    def _hear(self, connection: socket.socket) -> dict[Peer, bool]:
        """Read from a connection; return the peer that is lost with it, and True if its host does not answer."""
        silent = False
        try:
            data = connection.recv(GREETING_BYTES)
        except BlockingIOError:
            return {}
        except ConnectionError:
            data = b""
        except OSError:  # ETIMEDOUT, EHOSTUNREACH, ENETUNREACH
            data, silent = b"", True
        if connection not in self._peers and (peer := self._greeted(data)) is not None:
            self._peers[connection] = peer
            return {}
        self._selector.unregister(connection)
        connection.close()
        lost = self._peers.pop(connection, None)
        if lost is None or (data and b"gone" not in data):
            return {}  # nobody that has greeted, or a farewell
        if data:
            self._follow()
        return {lost: silent}

    def _greeted(self, data: bytes) -> Peer | None:
        """Return the worker that a greeting is of. Returns None if it is of somebody else."""
        try:
            greeting = json.loads(data)
            if hmac.compare_digest(str(greeting["token"]), self._token):
                return Peer(int(greeting["rank"]), str(greeting["host"]))
        except (ValueError, TypeError, KeyError, RecursionError):
            pass
        return None

    # ---- end ----

    def _end(self, lost: Mapping[Peer, bool]) -> NoReturn:
        """Say which host is lost, unless a worker has told an error; end the others, and this process."""
        if self._is_first():
            sys.stderr.write(f"shardwise: {loss(lost, self._peers.values(), self._seconds)}\n")
            sys.stderr.flush()
        for connection in list(self._peers):
            _send(connection, {"gone": True})
        time.sleep(AFTER_SECONDS)  # launchers end all workers when one ends, maybe before another has read this
        _exit(1)

    def _follow(self) -> NoReturn:
        """End this process once the hub has said what is lost."""
        self.noticed.set()
        time.sleep(AFTER_SECONDS)
        _exit(1)

    def _is_first(self) -> bool:
        """Return whether this worker says it: the first that asks the job's store, else the first one of this host."""
        with contextlib.suppress(OutOfReach):
            return self._board.add("said") == 1
        if self._context.local_rank:  # the first one of this host may be so much later to notice it
            time.sleep(self._seconds / PROBES + AFTER_SECONDS)
            return False
        if self._context.elastic:
            _end_with_this(os.getppid())
        return True


def loss(lost: Mapping[Peer, bool], others: Iterable[Peer], seconds: float) -> str:
    """Return one line that says which host is lost.

    Args:
        lost: workers that are lost -> True if their host does not answer, False if they ended.
        others: workers that are not lost yet; those on a host that does not answer are about to be.
        seconds: time for which such a host has not answered.
    """
    silent = {peer.host for peer, is_silent in lost.items() if is_silent}
    gone = [*lost, *(peer for peer in others if peer.host in silent)]
    names = []
    for host in sorted(silent or {peer.host for peer in lost}):
        ranks = sorted(peer.rank for peer in gone if peer.host == host)
        workers = f"worker{'s' * (len(ranks) > 1)} {', '.join(map(str, ranks))}"
        names.append(f"host {host} ({workers})" if silent else f"{workers} on host {host}")
    fault = f"cannot be reached for {seconds:g} s" if silent else "ended without a word: killed, out of memory?"
    end = "all workers are ended; --resume goes on from the last checkpoint"
    return f"{' and '.join(names)} {fault}; {end}"


def _end_with_this(agent: int) -> None:
    """Let torchrun's agent end once its workers have: it asks a rendezvous that is out of reach without a time limit.

    A process of its own, which nobody waits for, kills it if it has not ended AGENT_SECONDS later (Linux only).
    """
    if not hasattr(os, "pidfd_open"):
        return
    descriptor = os.pidfd_open(agent)
    if os.fork():
        return
    os.setsid()
    nowhere = os.open(os.devnull, os.O_RDWR)
    for stream in range(3):
        os.dup2(nowhere, stream)
    time.sleep(AGENT_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        signal.pidfd_send_signal(descriptor, signal.SIGKILL)
    _exit(0)


def _keep_asking(connection: socket.socket, seconds: float) -> None:
    """Let the kernel close a connection whose other end does not answer for so many seconds."""
    pause = max(1, round(seconds / PROBES))
    options = {  # those that this system has: Linux has all of them
        "TCP_KEEPIDLE": pause,
        "TCP_KEEPALIVE": pause,  # the same on macOS
        "TCP_KEEPINTVL": pause,
        "TCP_KEEPCNT": max(1, round(seconds / pause) - 1),
        "TCP_USER_TIMEOUT": round(1000 * seconds),
    }
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in options.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(connection: socket.socket, frame: Mapping[str, Any]) -> None:
    with contextlib.suppress(OSError):
        connection.sendall(json.dumps(frame).encode() + b"\n")
