"""Negotiation of collectives: a thread of each rank executes those that all ranks have asked for, in one order.

torch.distributed needs all ranks to call the same collectives in the same order. Horovod matches them by name, and so
does this thread. It works in rounds: each rank announces the requests that are new, and all keep the same table of what
was announced by whom. A request that all have announced is checked and executed; the others wait for a later round.

    main thread       ask(handle) ........ ................ handle.wait() ──▶ result
    this thread            └─▶ announce to all ─▶ agree ─▶ execute ─┘

A rank without requests enters no round: those that have some wait for it. So an idle training costs nothing.
"""

from __future__ import annotations

import contextlib
import json
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from shardwise.compat.horovod import execution
from shardwise.compat.horovod.execution import Members
from shardwise.compat.horovod.requests import CollectiveRequest, HorovodInternalError, disagreement

PAUSE_SECONDS, LONGEST_PAUSE_SECONDS = 0.001, 0.02
"""Seconds before a round after one in which nobody had news; doubled each time, up to the second number."""

FUSED_BYTES = 64 << 20
"""Largest size of the all-reduces that are sent in one message, as in Horovod's tensor fusion."""


class CollectiveHandle:
    """A collective on its way: `wait` returns its result.

    Attributes:
        request: the request that was announced.
        tensors: this rank's tensors, until the end.
        targets: tensors that the result is copied into; None: new ones.
        form: `one` tensor, a `list` of a group, or a `pair` of received rows and their numbers.
    """

    def __init__(
        self,
        request: CollectiveRequest,
        tensors: Sequence[Tensor],
        targets: Sequence[Tensor] | None = None,
        form: str = "one",
    ) -> None:
        self.request, self.tensors, self.targets, self.form = request, list(tensors), targets, form
        self._done = threading.Event()
        self._outputs: list[Tensor] = []
        self._error: str | None = None
        cuda = [tensor for tensor in tensors if tensor.is_cuda]
        self._events = [torch.cuda.current_stream(tensor.device).record_event() for tensor in cuda]

    @property
    def done(self) -> bool:
        """Return whether the collective has ended."""
        return self._done.is_set()

    def await_inputs(self) -> None:
        """Wait until the tensors of GPUs have been computed."""
        for event in self._events:
            event.synchronize()

    def finish(self, outputs: Sequence[Tensor]) -> None:
        """Set the result, after copying it into the targets of a collective in place."""
        if self.targets is not None:
            for target, output in zip(self.targets, outputs, strict=True):
                target.copy_(output)
            outputs = self.targets
        for device in {tensor.device for tensor in outputs if tensor.is_cuda}:
            torch.cuda.current_stream(device).synchronize()
        self._outputs, self.tensors = list(outputs), []
        self._done.set()

    def fail(self, error: str) -> None:
        """Let `wait` raise HorovodInternalError."""
        self._error, self.tensors = error, []
        self._done.set()

    def wait(self) -> list[Tensor]:
        """Wait for the result and return it. Raises HorovodInternalError if the collective failed."""
        self._done.wait()
        if self._error is not None:
            raise HorovodInternalError(self._error)
        return self._outputs


class Negotiator:
    """Requests of one rank for collectives among `members`, and the thread that executes them."""

    def __init__(self, members: Members) -> None:
        self.members = members
        self._wake = threading.Condition()
        self._fresh: list[CollectiveRequest] = []
        self._open: dict[str, CollectiveHandle] = {}
        self._counts: Counter[str] = Counter()
        self._join: CollectiveHandle | None = None
        self._join_is_fresh = self._closing = False
        self._broken: str | None = None
        self._table: dict[str, dict[int, CollectiveRequest]] = {}
        self._joined: list[int] = []
        self._quiet_rounds = 0
        self._last_joined = -1
        self._thread = threading.Thread(target=self._serve, name="shardwise-horovod", daemon=True)
        self._thread.start()

    @property
    def broken(self) -> bool:
        """Return whether a rank is gone, so that no collective is possible any more."""
        return self._broken is not None

    def auto_name(self, kind: str) -> str:
        """Return a name for a request that has none: they are counted by their kind, on all ranks alike."""
        with self._wake:
            self._counts[kind] += 1
            return f"{kind}.noname.{self._counts[kind]}"

    def ask(self, handle: CollectiveHandle) -> None:
        """Ask for a collective.

        Raises:
            ValueError: a request of this name has not ended yet.
            HorovodInternalError: a rank is gone.
        """
        request = handle.request
        with self._wake:
            self._check_open()
            if request.name in self._open:
                raise ValueError(
                    f"{request.kind} {request.name!r}: a collective of this name has not ended: wait for it, or give "
                    "another name"
                )
            self._open[request.name] = handle
            self._fresh.append(request)
            self._wake.notify()

    def join(self) -> int:
        """Take part in the all-reduces of the others with zeros until all have joined; return the last that did."""
        handle = CollectiveHandle(CollectiveRequest("join", "join"), [])
        with self._wake:
            self._check_open()
            self._join, self._join_is_fresh = handle, True
            self._wake.notify()
        handle.wait()
        with self._wake:
            self._counts.clear()  # ranks that joined early have counted fewer
        return self._last_joined

    def close(self) -> None:
        """End the thread once all requests of this rank have ended."""
        with self._wake:
            self._closing = True
            self._wake.notify()
        self._thread.join()

    def _check_open(self) -> None:
        if self._broken is not None:
            raise HorovodInternalError(self._broken)
        if self._closing:
            raise HorovodInternalError("shutdown() has ended the collectives: call init() again")

    def _serve(self) -> None:
        try:
            with torch.no_grad():
                while self._await_work():
                    self._round()
        except Exception as error:  # a peer is gone, or sends what is no announcement
            self._break(f"a collective failed, a rank may be gone: {type(error).__name__}: {error}")

    def _await_work(self) -> bool:
        """Wait until this rank should enter a round. Returns False when it never will again."""
        with self._wake:
            while not (self._fresh or self._join_is_fresh):
                if self._open or self._join is not None:
                    if self._quiet_rounds:
                        longest = PAUSE_SECONDS * 2 ** min(self._quiet_rounds, 10)
                        self._wake.wait(min(longest, LONGEST_PAUSE_SECONDS))
                    return True
                if self._closing:
                    return False
                self._wake.wait()
            return True

    def _round(self) -> None:
        with self._wake:
            fresh, self._fresh = self._fresh, []
            joins, self._join_is_fresh = self._join_is_fresh, False
        message = json.dumps({"new": [request.to_json() for request in fresh], "joins": joins})
        news = False
        for rank, text in zip(self.members.ranks, execution.exchange(self.members, message.encode()), strict=True):
            told = json.loads(text)
            for value in told["new"]:
                request = CollectiveRequest.from_json(value)
                self._table.setdefault(request.name, {})[rank] = request
            if told["joins"]:
                self._joined.append(rank)
            news = news or bool(told["new"]) or told["joins"]
        self._quiet_rounds = 0 if news else self._quiet_rounds + 1
        self._execute_ready()
        if len(self._joined) == self.members.size:
            self._finish_join()

    def _finish_join(self) -> None:
        self._last_joined, self._joined = self._joined[-1], []
        with self._wake:
            handle, self._join = self._join, None
        assert handle is not None
        handle.finish([])

    def _execute_ready(self) -> None:
        """Execute the requests that all ranks have announced or left to others by joining, in the table's order."""
        needed = set(self.members.ranks) - set(self._joined)
        ready = [name for name, by_rank in self._table.items() if by_rank.keys() >= needed]
        agreed = []
        for name in ready:
            by_rank = self._table.pop(name)
            error = disagreement(by_rank, self.members.ranks)
            if error is None:
                agreed.append(by_rank)
            elif (handle := self._taken(name)) is not None:
                handle.fail(error)
        for batch in _fused(agreed):
            self._execute(batch)

    def _execute(self, batch: Sequence[dict[int, CollectiveRequest]]) -> None:
        """Execute requests of one message: several all-reduces, or one other collective."""
        requests = [next(iter(by_rank.values())) for by_rank in batch]
        with self._wake:
            handles = [self._open.get(request.name) for request in requests]
        tensors = [
            _zeros(request) if handle is None else handle.tensors
            for request, handle in zip(requests, handles, strict=True)
        ]
        for handle in handles:
            if handle is not None:
                handle.await_inputs()
        with _on_device(tensors):
            outputs = self._collective(batch[0], requests, tensors)
            for request, result in zip(requests, outputs, strict=True):
                if (handle := self._taken(request.name)) is not None:
                    handle.finish(result)

    def _collective(
        self, by_rank: dict[int, CollectiveRequest], requests: list[CollectiveRequest], tensors: list[list[Tensor]]
    ) -> list[list[Tensor]]:
        (first, *_), (own, *_) = requests, tensors
        if first.kind == "allreduce":
            return execution.allreduce(requests, tensors, self.members)
        if first.kind == "allgather":
            return [execution.allgather(by_rank, own, self.members)]
        if first.kind == "broadcast":
            return [execution.broadcast(first, own, self.members)]
        if first.kind == "alltoall":
            return [execution.alltoall(by_rank, own, self.members)]
        if first.kind == "reducescatter":
            return [execution.reducescatter(first, own, self.members)]
        return [[]]  # a barrier has nothing to execute: all ranks have announced it

    def _taken(self, name: str) -> CollectiveHandle | None:
        with self._wake:
            return self._open.pop(name, None)

    def _break(self, error: str) -> None:
        with self._wake:
            self._broken = error
            handles = [*self._open.values(), *([self._join] if self._join is not None else [])]
            self._open, self._join = {}, None
        for handle in handles:
            handle.fail(error)


def _fused(agreed: Sequence[dict[int, CollectiveRequest]]) -> Iterator[list[dict[int, CollectiveRequest]]]:
    """Yield requests in messages: neighbouring all-reduces that can be fused up to FUSED_BYTES, others alone."""
    numbers = iter(range(len(agreed)))

    def key(by_rank: dict[int, CollectiveRequest]) -> tuple[Any, ...]:
        request, number = next(iter(by_rank.values())), next(numbers)
        fusible = request.kind == "allreduce" and len(set(request.dtypes)) == 1
        return request.reduction if fusible else (number,)

    for _, group in groupby(agreed, key):
        batch: list[dict[int, CollectiveRequest]] = []
        size = 0
        for by_rank in group:
            extra = _size(next(iter(by_rank.values())))
            if batch and size + extra > FUSED_BYTES:
                yield batch
                batch, size = [], 0
            batch.append(by_rank)
            size += extra
        yield batch


def _size(request: CollectiveRequest) -> int:
    sizes = (torch.Size(shape).numel() for shape in request.shapes)
    return sum(size * getattr(torch, dtype).itemsize for size, dtype in zip(sizes, request.dtypes, strict=True))


def _zeros(request: CollectiveRequest) -> list[Tensor]:
    """Return the part of a rank that has joined in a request of the others."""
    device = torch.device(request.device, torch.cuda.current_device()) if request.device == "cuda" else "cpu"
    return [
        torch.zeros(shape, dtype=getattr(torch, dtype), device=device)
        for shape, dtype in zip(request.shapes, request.dtypes, strict=True)
    ]


def _on_device(tensors: Sequence[Sequence[Tensor]]) -> contextlib.AbstractContextManager[Any]:
    """Make the GPU of the tensors the current one of this thread."""
    device = next((tensor.device for group in tensors for tensor in group if tensor.is_cuda), None)
    return contextlib.nullcontext() if device is None else torch.cuda.device(device)
