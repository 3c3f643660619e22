"""A worker's side of the parameter servers: one connection to each, made again when it breaks.

A request whose answer was lost is sent again. Servers know by its clock whether it has taken effect, so that it never
does so twice.
"""

from __future__ import annotations

import select
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch import regroup, waiting, watch
from shardwise.parallel.servers.frames import BadFrame, Frame, Kind, receive_frame, send_frame
from shardwise.parallel.servers.handshake import Refused, greet

LOST_SECONDS = 60.0
"""Seconds for which a worker tries to reach a server that does not answer."""

RETRY_SECONDS = 0.05
"""Seconds between two attempts to connect."""

LOOK_SECONDS = 0.1
"""Seconds between two looks at whether workers are to meet again, while an answer has not come."""

UNLIMITED = 2**62
"""Limit of an answer: a server has proved that it knows the token."""


class ServerLink:
    """Connection to one server.

    Attributes:
        welcome: where the training stood when the connection was made.
    """

    def __init__(self, number: int, address: tuple[str, int], token: str, rank: int) -> None:
        self._number, self._address, self._token, self._rank = number, address, token, rank
        self._line: socket.socket | None = None
        self._request: Frame | None = None
        self.welcome: dict[str, Any] = {}

    def connect(self) -> None:
        """Connect, if there is no connection.

        Raises:
            RequestError: the server refuses this worker, or is none.
            ShardwiseError: it cannot be reached within LOST_SECONDS.
        """
        end = time.monotonic() + LOST_SECONDS
        while self._line is None:
            try:
                line = socket.create_connection(self._address, timeout=max(1.0, end - time.monotonic()))
                line.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                self.welcome = greet(line, self._token, self._rank)
                self._line = line
            except Refused as error:
                raise RequestError(f"{self} refuses worker {self._rank}: {error}") from None
            except (OSError, EOFError) as error:
                if time.monotonic() >= end:
                    raise ShardwiseError(f"{self} cannot be reached for {LOST_SECONDS:g} s: {error}") from None
                time.sleep(RETRY_SECONDS)

    def send(self, request: Frame) -> None:
        """Send a request, to be answered by `receive`."""
        self._request = request
        self.connect()
        assert self._line is not None
        try:
            send_frame(self._line, request)
        except OSError:
            self.close()  # `receive` sends it again

    def receive(self) -> Frame:
        """Return the answer to the request that was sent.

        Raises:
            ShardwiseError: the server cannot be reached, or could not do what was asked.
        """
        assert self._request is not None
        while True:
            if self._line is None:
                self.send(self._request)
            try:
                if self._line is not None:
                    self._await_answer(self._line)
                    answer = receive_frame(self._line, UNLIMITED)
                    break
            except BadFrame as error:
                raise ShardwiseError(f"{self}: {error}") from None
            except (OSError, EOFError):
                self.close()
        self._request = None
        if answer.kind == Kind.WRONG:
            raise ShardwiseError(f"{self}: {answer.facts.get('error')}")
        return answer

    def _await_answer(self, line: socket.socket) -> None:
        """Wait until an answer comes. Raises Regroup if workers are to meet again, which it may wait for."""
        while regroup.possible() and not select.select([line], [], [], LOOK_SECONDS)[0]:
            regroup.check()
            if regroup.lost():
                watch.alive()

    def close(self) -> None:
        """Close the connection."""
        line, self._line = self._line, None
        if line is not None:
            line.close()

    def __str__(self) -> str:
        host, port = self._address
        return f"parameter server {self._number} at {host}:{port}"


class ServerGroup:
    """All servers, as one worker sees them.

    Args:
        addresses: host and port of each server.
        token: the run's token.
        rank: rank of this worker.
        owners: parameter -> number of the server that holds it.
        again: whether this worker was started again while the others went on.

    Attributes:
        clock: number of contributions that this worker has given.
        joint: number of those that were joined with one of each other worker.
        left_out: contributions that this worker has left out, because it was away while the others went on.
    """

    def __init__(
        self,
        addresses: Sequence[tuple[str, int]],
        token: str,
        rank: int,
        owners: Mapping[str, int],
        *,
        again: bool = False,
    ) -> None:
        self._links = [ServerLink(number, address, token, rank) for number, address in enumerate(addresses)]
        self._owners = owners
        for link in self._links:
            link.connect()
        self.clock = self._links[0].welcome["clock"]
        self.joint = self._links[0].welcome["settled"]
        self.left_out = 0
        if again or not all(link.welcome["member"] for link in self._links):
            self._enter(again=again)

    def _enter(self, *, again: bool) -> None:
        """Be counted again after this worker was dropped; it goes on where the fastest worker is."""
        given, self.clock = self.clock, max(link.welcome["front"] for link in self._links)
        self.left_out = max(0, self.clock - given)
        self.joint = max(link.welcome["settled"] for link in self._links)
        self.ask(Kind.ENTER, lambda _: {"clock": self.clock, "again": again})

    def regroup(self, generation: int) -> None:
        """Let all workers go on together after the last joint mean that any server has settled.

        One worker asks for it, after all have connected and before any gives a contribution.
        """
        first = max(self._links, key=lambda link: int(link.welcome["settled"])).welcome
        facts = {"generation": generation, "settled": first["settled"], "clock": first["settled"], **first["settling"]}
        self.ask(Kind.REGROUP, lambda _: dict(facts))

    def begin_at(self, clock: int) -> None:
        """Go on as a worker that has given so many contributions, each of them settled."""
        self.clock = self.joint = clock

    @property
    def settled(self) -> int:
        """Return the number of joint means that were settled when this worker connected."""
        return max(int(link.welcome["settled"]) for link in self._links)

    def push(self, facts: Mapping[str, Any], tensors: Mapping[str, Tensor], *, together: bool) -> list[Frame]:
        """Give a contribution. Returns the servers' answers.

        Args:
            facts: weight, losses, turn, options and names of sparse gradients, see `Shard`.
            tensors: its gradients, see `rows`.
            together: whether it is to be joined with one of each other worker, and settled by `apply`.
        """
        sent = {**facts, "clock": self.clock, "together": together, "joint": self.joint}
        answers = self.ask(Kind.PUSH, lambda _: dict(sent), tensors)
        self.clock += 1
        return answers

    def apply(self, *, applied: bool, factor: float | None = None) -> list[Frame]:
        """Settle the joint contributions: update by their mean times `factor`, or not at all. Returns the answers."""
        facts = {"clock": self.joint, "applied": applied, "factor": factor}
        answers = self.ask(Kind.APPLY, lambda _: dict(facts))
        self.joint += 1
        return answers

    def ask(
        self,
        kind: Kind,
        facts: Callable[[int], dict[str, Any]] = lambda _: {},
        tensors: Mapping[str, Tensor] | None = None,
    ) -> list[Frame]:
        """Ask all servers at once, and return their answers. The time spent here counts as waiting.

        Args:
            kind: kind of the request.
            facts: number of a server -> facts for it.
            tensors: tensors `KIND/NAME...`, each of which goes to the server that holds the parameter.
        """
        begin = time.perf_counter()
        parts: list[dict[str, Tensor]] = [{} for _ in self._links]
        for name, tensor in (tensors or {}).items():
            parts[self._owner(name)][name] = tensor
        for number, (link, part) in enumerate(zip(self._links, parts, strict=True)):
            link.send(Frame(kind, facts(number), part))
        answers = [link.receive() for link in self._links]
        waiting.add(begin)
        return answers

    def owned(self, number: int, names: Sequence[str]) -> list[str]:
        """Return those of `names` that server `number` holds."""
        return [name for name in names if self._owners[name] == number]

    def close(self) -> None:
        """Close all connections."""
        for link in self._links:
            link.close()

    def _owner(self, path: str) -> int:
        """Return the server of a tensor `KIND/NAME` or `s/NAME/PATH`; names of parameters have no slash."""
        return self._owners[path.split("/")[1]]
