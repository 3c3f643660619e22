"""Local workers: fresh interpreters on this machine that receive the function to call over a Unix socket.

    run_local ── Processes ──── python .../worker.py      rank 0 ┐
        └─────── Switchboard ── function, arguments ───▶  rank 1 ┘ one process group, which meets over a file

Workers do not import the parent's main module: scripts need no `__main__` guard, and functions defined in a script or a
notebook travel by value. Nothing listens on a network: the socket and the file lie in a folder that only this user can
enter. Workers on CPUs share memory that has no name; where they use gloo, its connections use the loopback device.
"""

from __future__ import annotations

import signal
import sys
import time
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any

from shardwise import errors
from shardwise.errors import ShardwiseError, WorkerFailed, WorkerHung
from shardwise.launch.context import given_threads
from shardwise.launch.join import check_encryption, threads_per_worker
from shardwise.launch.processes import Processes
from shardwise.launch.shared_memory.choice import transport
from shardwise.launch.signals import Signals, Terminated
from shardwise.launch.watch import SUSPENDED_SECONDS

if TYPE_CHECKING:
    from shardwise.launch.switchboard import EarlyExit, Switchboard

LOOK_SECONDS = 0.02
"""Seconds between two looks of the parent at its workers."""

ENDING_SECONDS = 5.0
"""Seconds that workers may take to end after they have answered."""


class RemoteTraceback(Exception):
    """Cause of a WorkerFailed in the parent: displays the worker's own traceback."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_local(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    workers: int,
    threads: int | None = None,
    gpus: bool = True,
    grace: float = 0.0,
    patience: float = float("inf"),
    restarts: int = 0,
) -> Any:
    """Call `function(*args)` in each of `workers` processes that form one process group; return rank 0's result.

    Args:
        function: any function; it and its arguments travel by cloudpickle.
        args: arguments of the function.
        workers: number of processes; 1 also starts a process of its own, so that comparisons are fair.
        threads: intra-op threads of each worker; None: an even share of the cores. OMP_NUM_THREADS overrides it.
        gpus: True if workers may use GPUs.
        grace: seconds that workers get to return by themselves after SIGTERM, which is passed on to them (see
            `launch.stop`); 0: they are ended at once.
        patience: seconds for which a worker may be stopped (SIGSTOP) before all workers are ended.
        restarts: number of workers to start again after SIGKILL, while the function allows it: see `launch.regroup`.

    Raises:
        RequestError: the function or its arguments cannot be sent.
        WorkerFailed: a worker died; all others have been ended.
        ShardwiseError: a worker raised it; the class is kept.
        KeyboardInterrupt: Ctrl-C; all workers have been ended.
        Terminated: this process was told to end (SIGTERM, SIGHUP) and the workers did not return within `grace`.
    """
    given_threads()  # raises for a wrong OMP_NUM_THREADS before any worker starts
    transport()  # and for a wrong setting
    check_encryption()
    with Signals() as signals:
        running = LocalRun(
            function, args, workers=workers, threads=threads, gpus=gpus, patience=patience, restarts=restarts
        )
        try:
            _attend(running, signals, grace)
            return running.returned()
        finally:
            signals.mute()  # a further signal cannot end it sooner: the rest takes milliseconds
            running.end()


class LocalRun:
    """Workers that run one call, from their start to their end. Its arguments are those of `run_local`."""

    def __init__(
        self,
        function: Callable[..., Any],
        args: tuple[Any, ...] = (),
        *,
        workers: int,
        threads: int | None = None,
        gpus: bool = True,
        patience: float = float("inf"),
        restarts: int = 0,
    ) -> None:
        from shardwise.launch.sending import written
        from shardwise.launch.switchboard import Switchboard  # its imports would slow down `shardwise --help`

        setup = {"path": sys.path, "threads": threads or threads_per_worker(workers), "gpus": gpus, "workers": workers}
        setup["restarts"] = restarts > 0
        self._left = self._restarts = restarts
        self._switchboard = Switchboard(setup, written((function, args)))
        try:
            self._processes = Processes(workers, self._switchboard.address)
        except BaseException:
            self._switchboard.close()
            raise
        self._stops = StopDetector(self._processes, patience)

    @property
    def finished(self) -> bool:
        """Return whether all workers have answered."""
        return len(self._switchboard.finished) == len(self._processes)

    @property
    def at_gate(self) -> list[dict[str, Any]] | None:
        """Return the values by rank with which the workers came to their gates. Returns None unless all wait there."""
        waiting = dict(self._switchboard.waiting)
        return [waiting[rank] for rank in sorted(waiting)] if len(waiting) == len(self._processes) else None

    def stop(self) -> None:
        """Stop all workers that wait at their gates: even there, threads of process groups poll their connections."""
        self._processes.send_to_all(signal.SIGSTOP)

    def open_gates(self) -> None:
        """Let all workers go on from their gates."""
        self._processes.send_to_all(signal.SIGCONT)
        self._switchboard.open_gates()

    def send(self, number: signal.Signals) -> None:
        """Send a signal to each worker that still runs."""
        self._processes.send(number)

    def check(self) -> None:
        """Look for a worker that has failed or is stopped. Raises ShardwiseError."""
        early = self._processes.exits().keys() - self._switchboard.finished
        self._switchboard.settle(early)
        if (self._switchboard.endings or early - self._switchboard.finished) and not self._restarted(early):
            raise _linger(self._processes, self._switchboard)
        self._stops.check()

    def _restarted(self, early: Collection[int]) -> bool:
        """Start the only worker that has ended again, if it was killed and the others can go on. Returns whether."""
        board, exits = self._switchboard, self._processes.exits()
        ended = {each.rank for each in board.endings if each.report is None} | set(early)
        reports = [each for each in board.endings if each.report is not None]
        everybody = len(board.restartable) == len(self._processes) and not board.finished
        if len(ended) != 1 or reports or not everybody or not self._left:
            return False
        (rank,) = ended
        if exits.get(rank) is None:  # its socket closed a moment before its end
            return True
        if exits[rank] != -signal.SIGKILL:
            return False
        self._left -= 1
        board.replace(rank)
        number = self._restarts - self._left
        sys.stderr.write(
            f"shardwise: worker {rank} {_ended(exits[rank])}: the others go on, and it is started again "
            f"({number} of {self._restarts})\n"
        )
        self._processes.restart(rank)
        return True

    def returned(self) -> Any:
        """Wait a moment until the workers have ended, and return the result of rank 0."""
        import cloudpickle

        _await_exits(self._processes, ENDING_SECONDS)
        assert self._switchboard.returned is not None
        return cloudpickle.loads(self._switchboard.returned)

    def end(self) -> None:
        """End all workers that still run, with all that they have started."""
        self._processes.kill()
        self._switchboard.close()


class StopDetector:
    """Detector of workers that have been stopped (SIGSTOP) for too long.

    A stopped worker cannot notice it itself, and a single worker has no peers that would.
    """

    def __init__(self, processes: Processes, seconds: float) -> None:
        self._processes, self._seconds = processes, seconds
        self._since: dict[int, float] = {}
        self._looked = time.monotonic()

    def check(self) -> None:
        """Look for stopped workers, at most once a second. Raises WorkerHung."""
        now = time.monotonic()
        if now - self._looked < 1.0:
            return
        if now - self._looked > SUSPENDED_SECONDS:  # the parent was stopped as well: somebody suspended the whole job
            self._since = {}
        self._looked = now
        self._since = {rank: self._since.get(rank, now) for rank in self._processes.stopped()}
        for rank, since in self._since.items():
            if now - since > self._seconds:
                raise WorkerHung(
                    f"worker {rank} has been stopped (SIGSTOP) for {now - since:.0f} s; all workers are ended",
                    rank=rank,
                )


def _attend(running: LocalRun, signals: Signals, grace: float) -> None:
    """Wait until all workers have answered; pass on signals, and notice failures.

    Raises:
        ShardwiseError: a worker failed.
        Terminated: this process was told to end.
    """
    told = 0.0
    while not running.finished:
        if signals.stop and not told:
            told = time.monotonic()
            running.send(signal.SIGTERM)
        if told and (signals.again or time.monotonic() >= told + grace):
            raise Terminated(128 + signals.stop)
        try:
            running.check()
        except WorkerFailed as error:
            if told and not error.traceback and not isinstance(error, WorkerHung):
                raise Terminated(128 + signals.stop) from None  # the worker died of SIGTERM before it had a handler
            raise
        time.sleep(LOOK_SECONDS)


def _await_exits(processes: Processes, seconds: float) -> None:
    """Wait at most `seconds` until all processes have ended by themselves."""
    end = time.monotonic() + seconds
    while len(processes.exits()) < len(processes) and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)


def _linger(processes: Processes, switchboard: Switchboard) -> ShardwiseError:
    """Wait a moment for the cause of a failure, which may become visible after its effects, and return the error."""
    from shardwise.launch.switchboard import LINGER_SECONDS

    _await_exits(processes, LINGER_SECONDS)
    exits = processes.exits()
    switchboard.settle(exits)
    ended = {rank: status for rank, status in exits.items() if rank not in switchboard.finished}
    return _failure(list(switchboard.endings), ended)


def _failure(endings: list[EarlyExit], exits: dict[int, int]) -> ShardwiseError:
    """Return the error of the worker that failed first; errors that it caused in other workers are left out.

    Args:
        endings: error reports and broken connections of workers, before the parent ended any worker.
        exits: rank -> exit status of the workers that ended by themselves.
    """
    if not endings:
        rank = min(exits)
        return WorkerFailed(f"worker {rank} {_ended(exits[rank])} before it was ready", rank=rank)

    from shardwise.launch.switchboard import LINGER_SECONDS

    soon = min(ending.time for ending in endings) + LINGER_SECONDS
    # a death without a report precedes the reports around it: those tell of broken connections
    first = min((ending for ending in endings if ending.time <= soon), key=_precedence)
    if first.report is None:
        return WorkerFailed(f"worker {first.rank} {_ended(exits.get(first.rank, 0))}", rank=first.rank)
    return _reported(first.rank, first.report)


def _precedence(ending: EarlyExit) -> tuple[bool, bool, float]:
    hung = ending.report is not None and ending.report["error"] == WorkerHung.__name__
    return (not hung, ending.report is not None, ending.time)


def _reported(rank: int, report: dict[str, Any]) -> ShardwiseError:
    kind = getattr(errors, report["error"], None)
    if kind is WorkerHung:
        return WorkerHung(report["message"], rank=report["rank"], traceback=report["traceback"])
    if isinstance(kind, type) and issubclass(kind, ShardwiseError) and kind is not WorkerFailed:
        return kind(report["message"])
    if report["error"] == "SystemExit":
        code = report["message"] or "0"
        return WorkerFailed(f"worker {rank} left early: the workload's code called sys.exit({code})", rank=rank)
    message = f"worker {rank} failed: {report['error']}: {report['message']}"
    failed = WorkerFailed(message, rank=rank, traceback=report["traceback"])
    failed.__cause__ = RemoteTraceback(report["traceback"])
    return failed


def _ended(status: int) -> str:
    """Describe the end of a process in words: 'was killed by SIGKILL', 'ended with exit status 3'."""
    if status >= 0:
        return f"ended with exit status {status}" + ("" if status else ", its work was not done")
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def enough_gpus(workers: int) -> bool:
    """Return whether there is a GPU for each worker; print a line if there are some, but too few."""
    import torch

    count = torch.cuda.device_count()
    if 0 < count < workers:
        sys.stderr.write(f"{count} GPU for {workers} workers: they compute on the CPU\n")
    return count >= workers
