"""A parameter server: the sockets, threads and log around a `Shard`.

Each worker has a connection of its own, served by a thread. Events take effect one at a time. Each is written to the
log before it takes effect, and answered after that; a server that is started again replays its log and goes on.
"""

from __future__ import annotations

import contextlib
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.launch.beside import leave
from shardwise.parallel.servers.frames import BadFrame, Frame, Kind, receive_frame, send_frame
from shardwise.parallel.servers.handshake import Refused, admit
from shardwise.parallel.servers.journal import Journal
from shardwise.parallel.servers.shard import Shard
from shardwise.workload.workload import Workload

EVENTS_PER_STATE = 8
"""Size of the log's events, in sizes of the server's parameters, from which it writes its whole state anew."""

LEAST_EVENT_BYTES = 16 * 2**20
"""Least size of the log's events from which a server writes its whole state anew."""

MOST_GREETINGS = 64
"""Largest number of connections that have not proved yet that they know the token; further ones are closed."""

ABSENT_SECONDS = 20.0
"""Seconds that a worker may be without a connection before it is dropped."""

LOOK_SECONDS = 0.25
"""Seconds between two looks for absent workers."""

FRAME_SLACK = 2**20
"""Bytes that a request may have beyond a few copies of the server's parameters: names and numbers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSetup:
    """Arguments of a server.

    Attributes:
        workload: its optimizer, with the parameters' groups.
        trained: the model's trained parameters by name, whole, without values.
        names: names of the parameters that this server holds.
        workers: number of workers.
        token: the run's token.
        staleness: steps by which a worker may be ahead of the slowest one; None: any number.
        folder: folder of its log.
        threads: threads of its optimizer.
        absent_seconds: see ABSENT_SECONDS; infinite: workers are never dropped.
    """

    workload: Workload
    trained: dict[str, nn.Parameter]
    names: tuple[str, ...]
    workers: int
    token: str
    staleness: int | None
    folder: str
    threads: int = 1
    absent_seconds: float = ABSENT_SECONDS


def run_server(setup: ServerSetup, listener: socket.socket, ending: threading.Event) -> None:
    """Serve on a listening socket until `ending` is set and the last worker has left."""
    torch.set_num_threads(setup.threads)
    server = ParameterServer(setup, listener)
    threading.Thread(target=server.serve, name="shardwise-accept", daemon=True).start()
    ending.wait()
    server.await_leaving()
    leave(setup.folder)


class ParameterServer:
    """Server of some parameters; creating one replays its log."""

    def __init__(self, setup: ServerSetup, listener: socket.socket) -> None:
        self._setup, self._listener = setup, listener
        self._shard = Shard(setup.workload, setup.trained, setup.names, setup.workers)
        self._journal = Journal(Path(setup.folder))
        replayed = 0
        for event in self._journal.replay():
            self._shard.take(event)
            replayed += 1
        self._changed = threading.Condition()
        self._greeting = threading.Semaphore(MOST_GREETINGS)
        self._lines: dict[int, socket.socket] = {}
        # workers of a new server have yet to start; those of one that died were there a moment ago
        self._absent: dict[int, float] = dict.fromkeys(self._shard.members, time.monotonic()) if replayed else {}
        held = sum(each.numel() * each.element_size() for each in self._shard.parameters.values())
        self._limit = 8 * held + FRAME_SLACK  # a gradient of rows with their numbers, or parameters with two moments
        self._rewrite = max(LEAST_EVENT_BYTES, EVENTS_PER_STATE * held)

    def serve(self) -> None:
        """Accept connections until the listening socket is closed."""
        threading.Thread(target=self._drop_absent, name="shardwise-absent", daemon=True).start()
        while True:
            try:
                line, _ = self._listener.accept()
            except OSError:
                return
            if not self._greeting.acquire(blocking=False):
                line.close()
                continue
            threading.Thread(target=self._attend, args=(line,), name="shardwise-worker", daemon=True).start()

    def await_leaving(self) -> None:
        """Wait until no worker is connected."""
        with self._changed:
            self._changed.wait_for(lambda: not self._lines)

    def _attend(self, line: socket.socket) -> None:
        """Serve one connection until it ends."""
        rank = -1
        try:
            line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            try:
                rank, proof = admit(line, self._setup.token)
            finally:
                self._greeting.release()
            if not 0 <= rank < self._setup.workers:
                send_frame(line, Frame(Kind.WRONG, {"error": f"there is no worker {rank}"}))
                return
            send_frame(line, Frame(Kind.WELCOME, {"proof": proof, **self._welcome(rank, line)}))
            while True:
                request = receive_frame(line, self._limit)
                send_frame(line, self._answered(rank, request))
        except (OSError, EOFError, BadFrame, Refused):
            return
        finally:
            line.close()
            with self._changed:
                if self._lines.get(rank) is line:
                    del self._lines[rank]
                    self._absent[rank] = time.monotonic()
                    self._changed.notify_all()

    def _welcome(self, rank: int, line: socket.socket) -> dict[str, Any]:
        """Note a worker's connection, and return where the training stands."""
        with self._changed:
            old = self._lines.get(rank)
            self._lines[rank] = line
            self._absent.pop(rank, None)
            if old is not None:
                with contextlib.suppress(OSError):
                    old.shutdown(socket.SHUT_RDWR)
            shard = self._shard
            return {
                "member": rank in shard.members,
                "clock": shard.clocks[rank],
                "front": shard.front(),
                "settled": shard.settled,
                "settling": shard.settling,
            }

    def _answered(self, rank: int, request: Frame) -> Frame:
        """Return the answer to a request; what goes wrong in it is an answer too."""
        answer: dict[Kind, Callable[[int, Frame], Frame]] = {
            Kind.PUSH: self._push,
            Kind.APPLY: self._apply,
            Kind.WAIT: self._wait,
            Kind.READ: self._read,
            Kind.WRITE: self._write,
            Kind.ENTER: self._enter,
            Kind.REGROUP: self._write,
        }
        if request.kind not in answer:
            return Frame(Kind.WRONG, {"error": f"no request: {request.kind.name}"})
        try:
            return answer[request.kind](rank, request)
        except Exception as error:  # of the user's optimizer, say: the worker that asked reports it
            sys.stderr.write(f"shardwise: parameter server: {type(error).__name__}: {error}\n")
            return Frame(Kind.WRONG, {"error": f"{type(error).__name__}: {error}"})

    def _take(self, rank: int, event: Frame) -> None:
        """Log an event of a worker and let it take effect, unless it has; called with the lock held."""
        event.facts["rank"] = rank
        if not self._shard.is_new(event):
            return
        self._journal.append(event)
        self._shard.take(event)
        if self._journal.event_bytes > self._rewrite:
            self._journal.begin(self._shard.state())
        self._changed.notify_all()

    def _push(self, rank: int, request: Frame) -> Frame:
        """Take a contribution. Answers once the joint mean is complete, or the worker may take its next step."""
        with self._changed:
            if rank not in self._shard.members:
                return Frame(Kind.WRONG, {"error": f"worker {rank} was dropped: it was away for too long"})
            if request.facts["clock"] > self._shard.clocks[rank]:
                return Frame(Kind.WRONG, {"error": "its log is gone: start again from a checkpoint"})
            self._take(rank, request)
            if request.facts["together"]:
                joint = request.facts["joint"]
                self._changed.wait_for(lambda: self._shard.joined > joint)
                return Frame(Kind.DONE, {"square": self._shard.square, **self._facts()})
            return self._once_near(rank, self._setup.staleness)

    def _apply(self, rank: int, request: Frame) -> Frame:
        """Settle a joint mean; the first worker that asks settles it for all."""
        with self._changed:
            self._take(rank, request)
            return self._parameters() if request.facts["applied"] else Frame(Kind.DONE, self._facts())

    def _wait(self, rank: int, request: Frame) -> Frame:
        """Answer with the parameters once all workers have taken as many steps as this one."""
        with self._changed:
            return self._once_near(rank, 0)

    def _once_near(self, rank: int, staleness: int | None) -> Frame:
        shard = self._shard
        if staleness is not None:
            self._changed.wait_for(lambda: shard.slowest() >= shard.clocks[rank] - staleness)
        return self._parameters()

    def _parameters(self) -> Frame:
        """Return the parameters as they are now; copies, because the next update writes into them."""
        return Frame(Kind.DONE, self._facts(), _copied(self._shard.shown_parameters()))

    def _facts(self) -> dict[str, Any]:
        shard = self._shard
        return {
            "updates": shard.updates,
            "losses": list(shard.losses),
            "slowest": shard.slowest(),
            "members": len(shard.members),
            "stop_at": shard.stop_at,
            "reason": shard.reason,
        }

    def _read(self, rank: int, request: Frame) -> Frame:
        """Return the parameters, the mean gradients, or the optimizer's state of some parameters."""
        with self._changed:
            what = request.facts["what"]
            if what == "parameters":
                return self._parameters()
            if what == "gradients":
                return Frame(Kind.DONE, {}, _copied(self._shard.shown_gradients()))
            tensors, plain = self._shard.optimizer_state(request.facts["names"])
            return Frame(Kind.DONE, {"plain": plain, "options": self._shard.options()}, _copied(tensors))

    def _write(self, rank: int, request: Frame) -> Frame:
        with self._changed:
            self._take(rank, request)
            return Frame(Kind.DONE)

    def _enter(self, rank: int, request: Frame) -> Frame:
        """Count a worker that was dropped, or was started again, from the clock that it gives."""
        with self._changed:
            if rank not in self._shard.members or request.facts.get("again"):
                self._take(rank, request)
            return self._parameters()

    def _drop_absent(self) -> None:
        """Drop workers that have been without a connection for too long; one at least stays."""
        while True:
            time.sleep(LOOK_SECONDS)
            with self._changed:
                now, members = time.monotonic(), self._shard.members
                for rank, since in list(self._absent.items()):
                    if rank in members and len(members) > 1 and now - since > self._setup.absent_seconds:
                        together = self._setup.staleness == 0
                        self._take(rank, Frame(Kind.DROP, {"together": together}))
                        sys.stderr.write(f"shardwise: worker {rank} is gone: the others go on without it\n")


def _copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}
