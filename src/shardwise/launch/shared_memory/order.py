"""Order of a group's collectives: each begins after the one before it, whichever thread runs it.

waited for at once      runs in the thread that calls it
waited for later        runs in a thread of the group, beside what computes; or in the thread that waits for it, if that
comes first
small, for later        fills its slot at once, and runs in the thread that waits for it
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from queue import SimpleQueue

import torch

from shardwise.launch.shared_memory.collectives import SlotOperation
from shardwise.launch.shared_memory.segment import SLOTS

LEFT = SLOTS - 2
"""Small collectives that may be left for the thread that waits for them: with more, the slots of others would not be
read while it does something else."""


class Callers:
    """Threads that call what follows a collective, as many as are needed at once.

    A callback may wait for a further collective (torch's PowerSGD hook does), which the thread that ran the first one
    may have to run.
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[Callable[[], None]] = SimpleQueue()
        self._lock = threading.Lock()
        self._idle = 0

    def call(self, function: Callable[[], None]) -> None:
        """Call a function soon, in a thread of its own."""
        with self._lock:
            if self._idle:
                self._idle -= 1
            else:
                threading.Thread(target=self._run, name="shardwise-callbacks", daemon=True).start()
        self._calls.put(function)

    def _run(self) -> None:
        while True:
            self._calls.get()()
            with self._lock:
                self._idle += 1


_callers = Callers()


class Queued:
    """Collective that has been called and need not have run.

    Attributes:
        started: True once nobody waits for this worker to run it.
        done: True once it has run, or failed.
        error: what it failed with.
    """

    def __init__(self, operation: SlotOperation) -> None:
        self._operation = operation
        self.started = self.done = False
        self.error: BaseException | None = None
        self._lock = threading.Lock()
        self._told: list[Callable[[], None]] = []

    def start(self) -> bool:
        """Fill slots as far as that does not wait, and return `started`."""
        self.started = self.started or self._operation.start()
        return self.started

    def run(self) -> None:
        """Run what is left of it, and tell those that have asked."""
        try:
            self._operation.finish()
        except BaseException as error:
            self.error = error
        with self._lock:
            self.done = self.started = True
        for call in self._told:
            _callers.call(call)

    def tell(self, call: Callable[[], None]) -> None:
        """Call a function once it is done: now if it is, else in another thread."""
        with self._lock:
            done = self.done
            if not done:
                self._told.append(call)
        if done:
            call()


class Order:
    """Queue of a group's collectives."""

    def __init__(self) -> None:
        self._queue: deque[Queued] = deque()
        self._running = threading.Lock()
        self._wanted = threading.Semaphore(0)
        self._thread: threading.Thread | None = None
        self._closed = False

    def now(self, operation: SlotOperation) -> None:
        """Run a collective after those that were called before."""
        with self._running:
            while self._queue:
                self._run_first()
            operation.finish()

    def later(self, operation: SlotOperation) -> Queued:
        """Call a collective that is waited for later."""
        pending = Queued(operation)
        self._queue.append(pending)
        if self._running.acquire(blocking=False):
            try:
                self._start()
            finally:
                self._running.release()
        if not pending.started or len(self._queue) > LEFT:
            self.hurry()
        return pending

    def wait(self, pending: Queued) -> None:
        """Run the collectives up to one that was called. Raises what it failed with."""
        while not pending.done:
            with self._running:
                if not pending.done:
                    self._run_first()
        if pending.error is not None:
            raise pending.error

    def hurry(self) -> None:
        """Let the group's thread run all collectives that were called."""
        if self._thread is None:
            alone, threads = threading.Event(), torch.get_num_threads()
            self._thread = threading.Thread(target=self._run, args=(alone,), name="shardwise-collectives", daemon=True)
            self._thread.start()
            alone.wait()
            if threads > 1:  # restores the number for threads that start later, see `workload.reading.loader`
                torch.set_num_threads(threads)
        self._wanted.release()

    def close(self) -> None:
        """End the group's thread."""
        self._closed = True
        self._wanted.release()

    def _run(self, alone: threading.Event) -> None:
        if torch.get_num_threads() > 1:
            torch.set_num_threads(1)
        alone.set()
        while not self._closed:
            self._wanted.acquire()
            while self._queue and not self._closed:
                with self._running:
                    if self._queue:
                        self._run_first()

    def _run_first(self) -> None:
        """Run the first collective of the queue, then start those behind it."""
        self._queue[0].run()
        self._queue.popleft()
        self._start()

    def _start(self) -> None:
        for pending in tuple(self._queue):
            if not pending.start():
                return
