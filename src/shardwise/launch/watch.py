"""Watch thread of a worker: notice that the job hangs, name the worker that blocks it, and end the job.

The main thread reports progress with `beat`. A worker without progress for longer than its limit asks all the others
what they are doing. Each answers from its watch thread, even while its main thread hangs. All reach one conclusion from
the answers (`verdict.hang`), and the lowest rank that can report it does. A worker that does not answer is stopped, or
its host is gone, or one of its threads never releases the interpreter's lock.

Texts on the board:

    call           number of the last question
    state-RANK     answer to it: {"call", ...State}
    pace-RANK      {...Pace}
    host-RANK      host name and process id
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from os import _exit

from shardwise.errors import WorkerHung
from shardwise.launch.board import Board, FolderBoard, OutOfReach, StoreBoard
from shardwise.launch.stacks import look
from shardwise.launch.verdict import Hang, Limits, Pace, State, hang, slow, slow_message, to_json

__all__ = ["FolderBoard", "StoreBoard", "alive", "beat", "settle", "slow_workers", "watching"]

LEAST_SECONDS = 60.0
"""Shortest idle limit in seconds if none is requested; also the least idle limit until the first step is done."""

BUSY_TIMES = 10.0
"""Ratio of the busy limit to the idle limit, and of the idle limit to the predicted step, if no limit is requested."""

SAMPLE_SECONDS, TICK_SECONDS, PACE_SECONDS = 0.1, 1.0, 5.0
"""Seconds between two samples of the main thread, two looks at the board, and two reports of a worker's pace."""

ANSWER_SECONDS, TURN_SECONDS = 4.0, 3.0
"""Seconds to wait for the answers of the others, and for each lower rank to report the verdict first."""

SUSPENDED_SECONDS = 3.0
"""Seconds between two samples above which the whole process must have been suspended."""

BUSY_SHARE = 0.2
"""Share of one processor's time above which a worker counts as busy."""


@dataclass(slots=True)
class _Seat:
    """Rank, board and progress of this process, which stay with it until it ends."""

    rank: int
    workers: int
    board: Board
    report: Callable[[BaseException], None]
    beats: int = 0
    last: float = field(default_factory=time.monotonic)
    slow: list[str] = field(default_factory=list)


_seat: _Seat | None = None
_watch: _Watch | None = None


def settle(rank: int, workers: int, board: Board, report: Callable[[BaseException], None]) -> None:
    """Register this process as a worker, once and before it is watched.

    Args:
        rank: rank of this process.
        workers: number of workers.
        board: board that all workers share.
        report: function that reports an error of this process; the watch thread calls it.
    """
    global _seat
    if hasattr(signal, "SIGUSR1") and signal.getsignal(signal.SIGUSR1) is signal.SIG_DFL:
        faulthandler.register(signal.SIGUSR1, all_threads=False)
    _seat = _Seat(rank, workers, board, report)


def beat() -> None:
    """Note progress of this worker: a step, a batch of an evaluation or a checkpoint is done."""
    if _seat is not None:
        _seat.beats += 1
        _seat.last = time.monotonic()


def alive() -> None:
    """Note that this worker gets on with something that is no step: a slow disk takes a checkpoint piece by piece."""
    if _seat is not None:
        _seat.last = time.monotonic()


def slow_workers() -> list[str]:
    """Return the messages about slow workers so far; rank 0 has them, other ranks return an empty list."""
    return [] if _seat is None else list(_seat.slow)


def limits(asked: float | None, step_seconds: float | None) -> Limits:
    """Return the limits for `asked` seconds, else the default limits for a predicted step of `step_seconds`."""
    if asked is not None:
        return Limits(asked, asked)
    idle = max(LEAST_SECONDS, BUSY_TIMES * (step_seconds or 0.0))
    return Limits(idle, BUSY_TIMES * idle)


@contextlib.contextmanager
def watching(limit: Limits) -> Iterator[None]:
    """Watch this worker while the block runs; does nothing in a process that is no worker.

    After the block the watch thread still answers the other workers, which may not be done yet.
    """
    global _watch
    if _seat is None:
        yield
        return
    _watch = _watch or _Watch(_seat)
    _seat.beats, _seat.last = 0, time.monotonic()
    _watch.asked = limit
    try:
        yield
    finally:
        _watch.asked = None


class _Watch:
    """Watch thread of one worker, which runs from the worker's first job until the process ends."""

    def __init__(self, seat: _Seat) -> None:
        self.seat = seat
        self.asked: Limits | None = None
        self._call = self._answered = 0
        self._samples: list[bool] = []
        self._places: Counter[str] = Counter()
        self._window = (time.monotonic(), seat.beats)
        self._used = (time.monotonic(), time.process_time())
        self._busy = True
        self._lost_since: float | None = None
        self._hosts: dict[int, tuple[str, int]] = {}
        self._slow: int | None = None
        self._suspect: int | None = None
        threading.Thread(target=self._run, name="shardwise-watch", daemon=True).start()

    @property
    def limit(self) -> Limits:
        """Return the limits that hold now; they are longer until the first step, while models are traced and read."""
        if self.asked is None:
            return Limits(float("inf"), float("inf"))
        if self.seat.beats:
            return self.asked
        return Limits(max(LEAST_SECONDS, self.asked.idle), max(BUSY_TIMES * LEAST_SECONDS, self.asked.busy))

    def _run(self) -> None:
        ticked, looked = 0.0, time.monotonic()
        while True:
            time.sleep(SAMPLE_SECONDS)
            gap = time.monotonic() - looked
            looked += gap
            if gap > SUSPENDED_SECONDS:  # the whole process was suspended: its pause is no hang
                self.seat.last += gap
            seen = look()
            self._samples.append(seen.waiting)
            if not seen.waiting:
                self._places[seen.operation] += 1
            if looked - ticked >= TICK_SECONDS:
                ticked = looked
                self._tick()

    def _tick(self) -> None:
        self._measure_use()
        try:
            self._meet()
            self._answer()
            self._tell_pace()
            if self._stalled() > self.limit.idle:
                self._ask()
            self._lost_since = None
        except OutOfReach:
            self._lose()

    def _stalled(self) -> float:
        return time.monotonic() - self.seat.last

    def _measure_use(self) -> None:
        now, used = time.monotonic(), time.process_time()
        before, used_before = self._used
        self._busy = used - used_before > BUSY_SHARE * (now - before)
        self._used = (now, used)

    # ---- hosts of the workers ----

    def _meet(self) -> None:
        """Read the hosts and process ids of all workers while the board can still be reached."""
        if len(self._hosts) == self.seat.workers:
            return
        if not self._hosts:
            self.seat.board.put(f"host-{self.seat.rank}", json.dumps([socket.gethostname(), os.getpid()]))
        for rank in range(self.seat.workers):
            text = self.seat.board.get(f"host-{rank}") if rank not in self._hosts else None
            if text is not None:
                name, process = json.loads(text)
                self._hosts[rank] = (str(name), int(process))

    # ---- questions and answers ----

    def _state(self) -> State:
        seen = look(stack=True)
        return State(self._stalled(), self.seat.beats, seen.waiting, self._busy, seen.operation, seen.stack)

    def _answer(self) -> None:
        """Put this worker's state on the board if the newest question has not been answered yet."""
        call = int(self.seat.board.get("call") or 0)
        if call > self._answered:
            self._answered = call
            text = json.dumps({"call": call, **to_json(self._state())})
            self.seat.board.put(f"state-{self.seat.rank}", text)

    def _ask(self) -> None:
        """Ask all workers what they are doing; if the job hangs, report it and end the job."""
        self._call = max(self._call, self._answered) + 1
        self.seat.board.put("call", str(self._call))
        end = time.monotonic() + ANSWER_SECONDS
        states: dict[int, State | None] = {}
        while time.monotonic() < end and (not states or None in states.values()):
            self._answer()
            states = {rank: self._read(rank) for rank in range(self.seat.workers)}
            time.sleep(SAMPLE_SECONDS)
        found = hang(states, self.limit, {rank: host for rank, (host, _) in self._hosts.items()})
        if found is None or self._stalled() <= self.limit.idle:
            return
        able = [rank for rank, state in states.items() if state is not None]
        time.sleep(sum(rank < self.seat.rank for rank in able) * TURN_SECONDS)
        if self._stalled() > self.limit.idle:
            self._end(found, [rank for rank, state in states.items() if state is None])

    def _read(self, rank: int) -> State | None:
        text = self.seat.board.get(f"state-{rank}")
        fields = json.loads(text) if text else {"call": 0}
        return State(**fields) if fields.pop("call") >= self._call else None

    def _lose(self) -> None:
        """Note that the board is out of reach; end the job once that and the current step exceed the idle limit."""
        now = time.monotonic()
        self._lost_since = self._lost_since or now
        if min(now - self._lost_since, self._stalled()) > self.limit.idle:
            host = f" on {self._hosts[0][0]}" if 0 in self._hosts else ""
            message = f"worker 0{host} cannot be reached for {self._stalled():.0f} s"
            self._end(Hang(0, f"{message}; worker {self.seat.rank} waits in {look().operation}", ""))

    def _end(self, found: Hang, silent: Sequence[int] = ()) -> None:
        """Report that the job hangs, and end this process and the processes of `silent` ranks on this host."""
        here = socket.gethostname()
        near = [process for host, process in (self._hosts[r] for r in silent if r in self._hosts) if host == here]
        if hasattr(signal, "SIGUSR1"):
            _send(near, signal.SIGUSR1)  # `faulthandler` prints their stacks without the interpreter's lock
            time.sleep(SAMPLE_SECONDS)
        remedy = f"give --hang-timeout more than {self.limit.idle:g} s if it only needs longer"
        message = f"{found.message}; all workers are ended: {remedy}"
        self.seat.report(WorkerHung(message, rank=found.rank, traceback=found.stack))
        _send(near, signal.SIGKILL)  # a stopped process reacts to no other signal
        _exit(1)

    # ---- pace of the workers ----

    def _tell_pace(self) -> None:
        """Put this worker's pace on the board every PACE_SECONDS; rank 0 then compares all of them."""
        begin, beats = self._window
        if time.monotonic() - begin < PACE_SECONDS or self.seat.beats < beats + 3:
            return
        waiting = sum(self._samples) / len(self._samples)
        place = self._places.most_common(1)[0][0] if self._places else ""
        self.seat.board.put(f"pace-{self.seat.rank}", json.dumps(to_json(Pace(waiting, place))))
        self._samples, self._places = [], Counter()
        self._window = (time.monotonic(), self.seat.beats)
        if self.seat.rank == 0:
            self._compare()

    def _compare(self) -> None:
        """Report a worker that was slow in two comparisons in a row, and report when it keeps up again."""
        texts = {rank: self.seat.board.get(f"pace-{rank}") for rank in range(self.seat.workers)}
        paces = {rank: Pace(**json.loads(text)) for rank, text in texts.items() if text}
        found = slow(paces) if len(paces) == self.seat.workers else None
        before, self._suspect = self._suspect, found
        if found == self._slow or found != before:
            return
        message = f"worker {self._slow} keeps up again" if found is None else slow_message(found, paces)
        self._slow = found
        self.seat.slow.append(message)
        _say(message)


def _send(processes: Sequence[int], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.kill(process, number)


def _say(message: str) -> None:
    """Write a line to standard error, above the progress bar if there is one."""
    from tqdm import tqdm

    tqdm.write(f"shardwise: {message}", file=sys.stderr)


def report_here(board: StoreBoard, error: BaseException) -> None:
    """Report an error of this worker of another launcher, unless another worker has reported one."""
    first = True
    with contextlib.suppress(OutOfReach):
        first = board.add("hang") == 1
    if first and isinstance(error, WorkerHung):
        sys.stderr.write(f"{error.traceback}shardwise: {error}\n")
        sys.stderr.flush()
