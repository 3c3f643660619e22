"""Discrete-event simulation of workers that compute and communicate.

    host      each worker has one; it issues operations onto streams one after another, and may wait for one to finish
    stream    runs its operations in the order of issue, each as soon as the operations that it depends on are done
    together  a collective: operations of several workers that start when all of them can, and end at the same time

While a worker communicates, it computes at 1 / `overlap` of its speed (`cluster.Device.overlap`).

The rules are those of CUDA streams and events and of NCCL collectives. A CPU worker, which computes on its host, is
one whose host waits for each operation.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

COMPUTE = "compute"
"""Name of the compute stream, the only one that communication slows down."""


@dataclass(slots=True, eq=False)
class Operation:
    """An operation of one worker on one of its streams. All times are in seconds.

    Attributes:
        worker: index of the worker.
        stream: name of the stream.
        name: label for display.
        kind: category by which times are summed, such as `forward`.
        seconds: duration without contention.
        launch: host time to launch it; the operation cannot end before its launch does.
        alone: least time from the start of its launch to its end, if only the launches of its kernels delay it.
        hosted: part of `seconds` that is host time, if the device is its own host.
        crowds: whether it slows down what the worker computes at the same time.
        notes: details for display, by name.
        start, end: simulated times; negative if the operation has not run.
        ready: time at which it would have ended if the host had launched it early enough.
        idle: time since which its stream had been idle when it started; negative if the stream was busy until then.
        cause: operation that it waited for last; None if it waited for none, or for the host.
    """

    worker: int
    stream: str
    name: str
    kind: str
    seconds: float
    launch: float = 0.0
    alone: float = 0.0
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
        """Return the seconds of device work, slowed by communication, without the host's part."""
        share = 1.0 - self.hosted / self.seconds if self.seconds else 1.0
        return (self.ready - self.start) * share

    @property
    def floor(self) -> float:
        """Return the earliest time at which it can end because of its launch."""
        return self._issued + max(self.launch, self.alone)


@dataclass(slots=True, eq=False)
class _Meeting:
    members: list[Operation] = field(default_factory=list)
    ready: int = 0


@dataclass(slots=True, eq=False)
class _Worker:
    overlap: float
    program: deque[tuple[bool, Operation]] = field(default_factory=deque)
    """Queue of the host: (True to wait for it or False to issue it, operation)."""
    streams: dict[str, deque[Operation]] = field(default_factory=dict)
    busy: dict[str, Operation | None] = field(default_factory=dict)
    free: dict[str, float] = field(default_factory=dict)
    crowd: int = 0
    blocker: Operation | None = None
    """Operation that the host waited for last, if it has launched nothing since."""


class Deadlock(Exception):
    """Operations wait for each other: the simulation was built wrongly, or the real program would deadlock."""


class Simulation:
    """Operations of all workers: first issued in the order of their hosts, then run once.

    Args:
        overlaps: for each worker, the factor by which its compute takes longer while it communicates; 1 for no effect.

    Attributes:
        done: finished operations, in the order in which they end.
    """

    def __init__(self, overlaps: Sequence[float]) -> None:
        self._workers = [_Worker(overlap) for overlap in overlaps]
        self._meetings: dict[object, _Meeting] = {}
        self._events: list[tuple[float, int, int, Operation | None, int]] = []
        self._count = 0
        self.done: list[Operation] = []

    # ---- what is to be done -----------------------------------------------------------------------------------------

    def issue(self, operation: Operation, after: Iterable[Operation | None] = (), together: object = None) -> Operation:
        """Append an operation to its worker's host queue and return it.

        Args:
            operation: new operation.
            after: operations, of any worker, that must end before it starts; None entries are skipped.
            together: key shared by the operations of all workers that take part in one collective; None if it is not
                a collective.
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
        """Make the worker's host wait until an operation of any worker is done; None adds no wait."""
        if operation is not None:
            self._workers[worker].program.append((True, operation))

    # ---- time -------------------------------------------------------------------------------------------------------

    def run(self) -> float:
        """Run all issued operations and return the time, in seconds, at which the last one ends.

        Raises:
            Deadlock: Some operations wait for each other and never run.
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
            raise Deadlock(f"{left[0].name} of worker {left[0].worker} waits for what never comes")
        return last

    def _push(self, when: float, worker: int, operation: Operation | None = None, version: int = 0) -> None:
        self._count += 1
        heapq.heappush(self._events, (when, self._count, worker, operation, version))

    def _host(self, now: float, number: int, waiting: dict[int, list[int]]) -> None:
        """Advance a host until it has to wait for an operation, or launches one that takes it time."""
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
        """Start an operation if its dependencies, its stream and all members of its collective are ready."""
        worker = self._workers[operation.worker]
        queue = worker.streams.get(operation.stream)
        if operation._pending or not queue or queue[0] is not operation or worker.busy.get(operation.stream):
            return
        meeting = operation._meeting
        if meeting is None:
            self._begin(now, operation)
            return
        worker.busy[operation.stream] = operation  # the stream is blocked until all members are ready
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
        """Schedule the end of an operation at the current speed; replaces its earlier schedule."""
        operation._version += 1
        operation.ready = now + operation._left / self._speed(operation)
        self._push(max(operation.ready, operation.floor), operation.worker, operation, operation._version)

    def _crowd(self, now: float, worker: _Worker, more: int) -> None:
        """Add `more` (1 or -1) to the operations that slow down compute, and reschedule the running one."""
        computing = worker.busy.get(COMPUTE)
        changes = computing is not None and computing.start >= 0 and worker.overlap > 1.0
        changes = changes and computing is not None and computing.ready > now  # else only its launch is awaited
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
