"""Workers on this machine, started by torch's own elastic launcher; and this process as a worker of an outer one.

    run_local ── elastic agent ── python .../worker.py   rank 0 ┐
        └─────── switchboard ─────────── function ────▶  rank 1 ┘ one process group

Workers are fresh interpreters that import nothing of the parent's main module: scripts need no `__main__` guard, and
functions defined in a script or a notebook travel by value.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardwise import errors
from shardwise.errors import ShardwiseError, StrategyError, WorkerFailed
from shardwise.launch.allocator import keep_memory, starting
from shardwise.launch.scheduling import run_uninterrupted

if TYPE_CHECKING:
    from torch.distributed.launcher.api import LaunchConfig

    from shardwise.launch.switchboard import Ending

MONITOR_SECONDS = 0.05
"""How often the agent looks after its workers."""

STOP_SECONDS = 5
"""Seconds that workers have to end after a signal, before they are killed."""

TASKS = Path("/proc/self/task")
"""Threads of this process, where the system shows them."""

LOOK_SECONDS, QUIET_LOOKS = 0.005, 3
"""Between looks at other threads, and how many in a row must find none that runs."""

_HANDLED = ("SIGTERM", "SIGHUP", "SIGQUIT")
"""Signals on which the agent ends its workers. An interrupt needs no handler: it is an exception already."""


class RemoteTraceback(Exception):
    """Shows a worker's own traceback as the cause of the error in the parent."""

    def __str__(self) -> str:
        return f"\n{self.args[0]}"


def run_local(
    function: Callable[..., Any],
    args: tuple[Any, ...] = (),
    *,
    workers: int,
    threads: int | None = None,
    gpus: bool = True,
) -> Any:
    """Calls `function(*args)` in each of `workers` processes that form one process group; returns what rank 0 returned.

    Args:
        function: any function; it and its arguments travel by cloudpickle.
        args: its arguments.
        workers: number of processes; 1 is a process of its own too, so that comparisons are fair.
        threads: intra-op threads of each; None: the cores shared out evenly. OMP_NUM_THREADS goes first.
        gpus: whether workers may use GPUs.

    Raises:
        WorkerFailed: a worker died; all others have been ended.
        ShardwiseError: one that a worker raised comes back as the same class.
    """
    import cloudpickle

    from shardwise.launch.switchboard import Switchboard  # what it imports would slow down `shardwise --help`

    setup = {"path": sys.path, "threads": threads or threads_per_worker(workers), "gpus": gpus}
    switchboard = Switchboard(setup, cloudpickle.dumps((function, args)))
    try:
        exits = _run_agent(switchboard.address, workers)
        switchboard.settle()
        if exits or switchboard.endings or switchboard.returned is None:
            raise _failure(switchboard.endings, exits)
        return cloudpickle.loads(switchboard.returned)
    finally:
        switchboard.close()
        _end_groups(switchboard.processes)


def threads_per_worker(workers: int) -> int:
    """Intra-op threads with which `workers` processes share the cores of this machine: at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // workers)


def under_torchrun() -> bool:
    """Whether this process is one of the workers of a launcher already, so that none are started."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def join(workers: int | None = None) -> None:
    """Makes this process a worker of the launcher that started it: device, threads, default process group.

    Raises:
        StrategyError: the launcher started another number than `workers`.
    """
    import torch
    import torch.distributed as dist

    started = int(os.environ["WORLD_SIZE"])
    if workers is not None and workers != started:
        raise StrategyError(f"{workers} workers are asked for, the launcher started {started}: use {started}")
    if dist.is_initialized():
        return
    keep_memory()
    if "OMP_NUM_THREADS" not in os.environ:
        os.environ["OMP_NUM_THREADS"] = str(threads_per_worker(int(os.environ.get("LOCAL_WORLD_SIZE", started))))
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    with contextlib.suppress(RuntimeError):  # settled already where something has computed in parallel
        torch.set_num_interop_threads(1)
    _use_loopback()
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
        dist.init_process_group("cpu:gloo,cuda:nccl")
    else:
        run_uninterrupted()
        dist.init_process_group("gloo")


def leave() -> None:
    """Ends the process group once all workers are done with it."""
    import torch
    import torch.distributed as dist

    # a worker that left while others still send would look to them like one that died
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def rest(seconds: float = 1.0) -> None:
    """Waits, at most so long, until no other thread of this process runs.

    Those of gloo let go of what they have sent a moment after who waited for it goes on. Where they need the
    interpreter for that while it ends, the process is aborted (pytorch/pytorch#179291).
    """
    own, end, quiet = threading.get_native_id(), time.monotonic() + seconds, 0
    while quiet < QUIET_LOOKS and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)  # who waits for the interpreter gets it now
        quiet = 0 if any(_runs(task) for task in TASKS.glob("*") if task.name != str(own)) else quiet + 1


def _runs(task: Path) -> bool:
    try:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended
        return False
    return state == "R"


def _use_loopback() -> None:
    """Lets gloo talk over the loopback device where all workers are here: it needs no name lookup, and no network."""
    import socket

    local = os.environ.get("LOCAL_WORLD_SIZE") == os.environ["WORLD_SIZE"]
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    if local and loopback:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", loopback)


def _run_agent(address: str, workers: int) -> dict[int, int]:
    """Runs the workers to their end. Returns rank -> exit status where they failed, else nothing.

    Raises:
        SystemExit: this process got a signal to end; its workers are gone.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import elastic_launch

    program = str(Path(__file__).with_name("worker.py"))
    with _quiet_agent(), _restored_signals(), _environment(starting()):
        try:
            elastic_launch(_config(workers), sys.executable)(program, address)
        except ChildFailedError as error:
            return {rank: failure.exitcode for rank, failure in error.failures.items()}
        except SignalException as error:
            raise SystemExit(128 + error.sigval) from None
    return {}


def _config(workers: int) -> LaunchConfig:
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.launcher.api import LaunchConfig

    handled = [n for n in _HANDLED if signal.getsignal(getattr(signal, n)) != signal.SIG_IGN]  # nohup stays nohup
    return LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=workers,
        run_id=f"shardwise-{os.getpid()}-{time.monotonic_ns()}",
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",  # any free port
        local_addr="localhost",
        max_restarts=0,
        monitor_interval=MONITOR_SECONDS,
        signals_to_handle=",".join(handled),
        shutdown_timeout=STOP_SECONDS,
        logs_specs=DefaultLogsSpecs(log_dir=os.devnull),
    )


@contextlib.contextmanager
def _quiet_agent() -> Iterator[None]:
    """Keeps the agent's log lines about failed workers away: one clear error says it instead. LOGLEVEL brings them."""
    loggers = [logging.getLogger(f"torch.distributed.{name}") for name in ("elastic", "launcher")]
    before = [(log.propagate, list(log.handlers)) for log in loggers]
    if "LOGLEVEL" not in os.environ:
        for log in loggers:
            log.propagate, log.handlers = False, [logging.NullHandler()]
    try:
        yield
    finally:
        for log, (propagate, handlers) in zip(loggers, before, strict=True):
            log.propagate, log.handlers = propagate, handlers


@contextlib.contextmanager
def _restored_signals() -> Iterator[None]:
    """Puts signal handlers back as they were: the agent leaves its own behind."""
    numbers = [getattr(signal, name) for name in _HANDLED]
    in_main = threading.current_thread() is threading.main_thread()  # else the agent sets none
    handlers = {number: signal.getsignal(number) for number in numbers} if in_main else {}
    try:
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _environment(more: Mapping[str, str]) -> Iterator[None]:
    """This process's environment, which workers inherit, with something more in it; then as it was.

    The agent leaves a variable of its own behind.
    """
    before = {name: os.environ.get(name) for name in (*more, "TORCHELASTIC_SIGNALS_TO_HANDLE")}
    os.environ.update(more)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def _failure(endings: list[Ending], exits: dict[int, int]) -> ShardwiseError:
    """The error of the worker that failed first; those that it caused in the others are not told.

    The cause can be seen a little later than its effects: a death without a word goes before the reports around it.
    """
    stopped = -signal.SIGTERM  # how the agent ends those that are left
    if not endings:
        rank = min(exits, key=lambda rank: (exits[rank] == stopped, rank), default=0)
        return WorkerFailed(f"worker {rank} {_ended(exits.get(rank, 0))} before it was ready", rank=rank)

    from shardwise.launch.switchboard import LINGER_SECONDS

    soon = min(ending.time for ending in endings) + LINGER_SECONDS
    first = min(
        (ending for ending in endings if ending.time <= soon),
        key=lambda ending: (exits.get(ending.rank) == stopped, ending.report is not None, ending.time),
    )
    if first.report is None:
        return WorkerFailed(f"worker {first.rank} {_ended(exits.get(first.rank, 0))}", rank=first.rank)
    return _reported(first.rank, first.report)


def _reported(rank: int, report: dict[str, Any]) -> ShardwiseError:
    kind = getattr(errors, report["error"], None)
    if isinstance(kind, type) and issubclass(kind, ShardwiseError) and kind is not WorkerFailed:
        return kind(report["message"])
    message = f"worker {rank} failed: {report['error']}: {report['message']}"
    failed = WorkerFailed(message, rank=rank, traceback=report["traceback"])
    failed.__cause__ = RemoteTraceback(report["traceback"])
    return failed


def _ended(status: int) -> str:
    """How a process ended, in words: 'was killed by SIGKILL', 'ended with exit status 3'."""
    if status >= 0:
        return f"ended with exit status {status}"
    name = signal.Signals(-status).name
    return f"was killed by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")


def _end_groups(processes: dict[int, int]) -> None:
    """Ends what dead workers had started themselves: each was the head of its own process group."""
    for process in processes.values():
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process, signal.SIGKILL)
