"""A simulation of workers that compute and communicate: each has a host that issues operations onto streams.

    host      issues one operation after the other; may wait until one is done
    stream    does its operations in the order in which they were issued, each when what it needs is done
    together  operations of several workers that begin when all of them can, and end at the same time (a collective)

While a worker communicates it computes at 1 / `overlap` of its speed (`cluster.Device.overlap`).

The rules are those of CUDA's streams and events and of NCCL's collectives; a worker that computes on its host (a CPU)
is one whose host waits for each operation.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

COMPUTE = "compute"
"""The stream whose operations communication slows down."""


@dataclass(slots=True, eq=False)
class Operation:
    """Something that a worker does.

    Attributes:
        worker: which.
        stream: of the worker.
        name: for people.
        kind: for sums: what it belongs to.
        seconds: it takes, alone.
        launch: seconds that the host needs to start it; it cannot be done before the host is.
        hosted: of its seconds, those that are the host's, where the device is the host.
        crowds: whether it slows down what the worker computes meanwhile.
        notes: for people, by name.
        start, end: when it was done; negative: it was not.
        ready: when it would have ended if the host had been ahead of it.
        idle: since when its stream had nothing to do; negative: it had.
        cause: the operation that it waited for last; None: for none, or for the host.
    """

    worker: int
    stream: str
    name: str
    kind: str
    seconds: float
    launch: float = 0.0
    hosted: float = 0.0
    crowds: bool = False
    notes: dict[str, object] = field(default_factory=dict)
    start: float = -1.0
    end: float = -1.0
    ready: float = -1.0
    idle: float = -1.0
    cause: Operation | None = field(default=None, repr=False)
    _pending: int = 0
    _issued: float = -1.0
    _followers: list[Operation] = field(default_factory=list, repr=False)
    _meeting: _Meeting | None = field(default=None, repr=False)
    _left: float = 0.0
    _since: float = 0.0
    _version: int = 0

    @property
    def computing(self) -> float:
        """Seconds for which it computed."""
        share = 1.0 - self.hosted / self.seconds if self.seconds else 1.0
        return (self.ready - self.start) * share

    @property
    def floor(self) -> float:
        """When the host has started all of it."""
        return self._issued + self.launch


@dataclass(slots=True, eq=False)
class _Meeting:
    members: list[Operation] = field(default_factory=list)
    ready: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    overlap: float
    program: deque[tuple[bool, Operation]] = field(default_factory=deque)
    """(whether to wait for it, operation)."""
    streams: dict[str, deque[Operation]] = field(default_factory=dict)
    busy: dict[str, Operation | None] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)
    crowd: int = 0
    blocker: Operation | None = None
    """What the host waited for just now."""


class Stuck(Exception):
    """Operations that wait for each other: a mistake in what was asked for, or a deadlock of the real program."""


class Simulation:
    """What workers do, first written down in the order in which their hosts issue it, then run.

    Args:
        overlaps: for each worker, how much slower it computes while it communicates; 1: not at all.
    """

    def __init__(self, overlaps: Sequence[float]) -> None:
        self._workers = [_Worker(overlap) for overlap in overlaps]
        self._meetings: dict[object, _Meeting] = {}
        self._events: list[tuple[float, int, int, Operation | None, int]] = []
        self._count = 0
        self.done: list[Operation] = []

    # ---- what is to be done -----------------------------------------------------------------------------------------

    def issue(self, operation: Operation, after: Iterable[Operation | None] = (), together: object = None) -> Operation:
        """The worker's host issues an operation next.

        Args:
            operation: new.
            after: what it needs, of any worker.
            together: a key that the same operation has on the other workers that take part.
        """
        for needed in after:
            if needed is not None:
                operation._pending += 1
                needed._followers.append(operation)
        if together is not None:
            operation._meeting = self._meetings.setdefault(together, _Meeting())
            operation._meeting.members.append(operation)
        self._workers[operation.worker].program.append((False, operation))
        return operation

    def wait(self, worker: int, operation: Operation | None) -> None:
        """The worker's host waits until an operation is done, its own or another worker's."""
        if operation is not None:
            self._workers[worker].program.append((True, operation))

    # ---- time -------------------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Does everything; returns when the last operation is done.

        Raises:
            Stuck: some of it never can be.
        """
        waiting: dict[int, list[int]] = {}
        for number in range(len(self._workers)):
            self._push(0.0, number)
        last = 0.0
        while self._events:
            now, _, worker, operation, version = heapq.heappop(self._events)
            if operation is None:
                self._host(now, worker, waiting)
            elif version == operation._version and operation.end < 0:
                self._finish(now, operation)
                last = max(last, now)
                for number in waiting.pop(id(operation), ()):
                    self._workers[number].blocker = operation
                    self._push(now, number)
        left = [op for worker in self._workers for _, op in worker.program]
        left += [op for worker in self._workers for stream in worker.streams.values() for op in stream]
        if left:
            raise Stuck(f"{left[0].name} of worker {left[0].worker} waits for what never comes")
        return last

    def _push(self, when: float, worker: int, operation: Operation | None = None, version: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, worker, operation, version))

    def _host(self, now: float, number: int, waiting: dict[int, list[int]]) -> None:
        """The host goes on until it waits, or until it has to start something that takes it time."""
        worker = self._workers[number]
        while worker.program:
            waits, operation = worker.program[0]
            if waits:
                if operation.end < 0:
                    waiting.setdefault(id(operation), []).append(number)
                    return
                worker.program.popleft()
                continue
            worker.program.popleft()
            operation._issued = now
            operation.cause = operation.cause or worker.blocker
            worker.streams.setdefault(operation.stream, deque()).append(operation)
            self._try(now, operation)
            if operation.launch:
                worker.blocker = None
                self._push(now + operation.launch, number)
                return

    def _try(self, now: float, operation: Operation) -> None:
        """Begins an operation if nothing stands in its way any more."""
        worker = self._workers[operation.worker]
        queue = worker.streams.get(operation.stream)
        if operation._pending or not queue or queue[0] is not operation or worker.busy.get(operation.stream):
            return
        meeting = operation._meeting
        if meeting is None:
            self._begin(now, operation)
            return
        worker.busy[operation.stream] = operation  # it stands here until the others come
        meeting.ready += 1
        if meeting.ready == len(meeting.members):
            for member in meeting.members:
                self._begin(now, member)

    def _begin(self, now: float, operation: Operation) -> None:
        worker = self._workers[operation.worker]
        worker.streams[operation.stream].popleft()
        worker.busy[operation.stream] = operation
        free = worker.free.get(operation.stream, 0.0)
        operation.start, operation.idle = now, free if free < now else -1.0
        operation._left, operation._since = operation.seconds, now
        if operation.crowds and operation.seconds > 0:
            self._crowd(now, worker, 1)
        self._plan(now, operation)

    def _speed(self, operation: Operation) -> float:
        worker = self._workers[operation.worker]
        return 1.0 / worker.overlap if operation.stream == COMPUTE and worker.crowd else 1.0

    def _plan(self, now: float, operation: Operation) -> None:
        """When it will be done if nothing changes."""
        operation._version += 1
        operation.ready = now + operation._left / self._speed(operation)
        self._push(max(operation.ready, operation.floor), operation.worker, operation, operation._version)

    def _crowd(self, now: float, worker: _Worker, more: int) -> None:
        """The worker communicates with one operation more, or less."""
        computing = worker.busy.get(COMPUTE)
        changes = computing is not None and computing.start >= 0 and worker.overlap > 1.0
        if changes and computing is not None:
            passed = (now - computing._since) * self._speed(computing)
            computing._left, computing._since = max(0.0, computing._left - passed), now
        worker.crowd += more
        if changes and computing is not None and computing.end < 0:
            self._plan(now, computing)

    def _finish(self, now: float, operation: Operation) -> None:
        worker = self._workers[operation.worker]
        operation.end = now
        worker.busy[operation.stream] = None
        worker.free[operation.stream] = now
        self.done.append(operation)
        if operation.crowds and operation.seconds > 0:
            self._crowd(now, worker, -1)
        for follower in operation._followers:
            follower._pending -= 1
            if not follower._pending:
                follower.cause = operation
                if follower._issued >= 0:
                    self._try(now, follower)
        queue = worker.streams[operation.stream]
        if queue:
            self._try(now, queue[0])
