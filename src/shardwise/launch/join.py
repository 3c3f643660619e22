"""Make this process a worker: device, threads, process group; and leave the group again at the end."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import socket
import sys
import threading
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

from shardwise.errors import RequestError, StrategyError
from shardwise.launch import watch
from shardwise.launch.allocator import keep_memory
from shardwise.launch.board import board_of
from shardwise.launch.context import RankContext, given_threads, rank_context
from shardwise.launch.scheduling import run_uninterrupted

PR_SET_PDEATHSIG = 1
"""Linux, <sys/prctl.h>: the signal that a process gets when its parent dies."""

MEET_SECONDS = 120.0
"""How long the workers of another launcher wait for each other before they give up."""

MEET_SETTING = "SHARDWISE_MEET_SECONDS"
"""Environment variable that sets another time."""

TASKS = Path("/proc/self/task")
"""Threads of this process, where the system shows them."""

LOOK_SECONDS, QUIET_LOOKS = 0.005, 3
"""Between looks at other threads, and how many in a row must find none that runs."""


def threads_per_worker(workers: int) -> int:
    """Share the cores of this machine out: intra-op threads of each of `workers` processes, at least 1."""
    affinity = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    return max(1, cores // workers)


def join_local(store: str, rank: int, workers: int) -> None:
    """Make this process one of the local `workers`, which meet over the file `store`: no port is opened for it."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    _start(str(rank), workers)
    os.environ.update(_loopback())
    _init(FileStore(store, workers), rank, workers)


def join_launcher(workers: int | None = None) -> None:
    """Make this process a worker of the launcher that started it, until it ends; nothing where it is one already.

    Raises:
        StrategyError: the launcher started another number than `workers`.
        RequestError: the other workers did not come within `MEET_SECONDS`.
    """
    import torch.distributed as dist

    context = rank_context()
    assert context is not None
    if workers is not None and workers != context.workers:
        raise StrategyError(
            f"{workers} workers are asked for, the launcher started {context.workers}: use {context.workers}"
        )
    if dist.is_initialized():
        return
    if context.elastic:
        die_with_parent()
    _start(str(context.local_rank), context.local_workers or context.workers)
    if context.one_host:
        for variable, device in _loopback().items():
            os.environ.setdefault(variable, device)
    _init(_meet(context), context.rank, context.workers)
    board = board_of(context)
    watch.settle(context.rank, context.workers, board, partial(watch.report_here, board))
    atexit.register(_leave_at_exit)


def leave() -> None:
    """End the process group once all workers are done with it."""
    import torch
    import torch.distributed as dist

    # a worker that left while others still send would look to them like one that died
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def rest(seconds: float = 1.0) -> None:
    """Wait, at most `seconds`, until no other thread of this process runs.

    Those of gloo let go of what they have sent a moment after who waited for it goes on. Where they need the
    interpreter for that while it ends, the process is aborted (pytorch/pytorch#179291).
    """
    own, end, quiet = threading.get_native_id(), time.monotonic() + seconds, 0
    while quiet < QUIET_LOOKS and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)  # who waits for the interpreter gets it now
        quiet = 0 if any(_runs(task) for task in TASKS.glob("*") if task.name != str(own)) else quiet + 1


def die_with_parent() -> None:
    """Let the kernel end this process when its parent dies, however that happens (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def _start(local_rank: str, local_workers: int) -> None:
    """Settle the memory, threads and device of this worker before it computes anything."""
    import torch

    keep_memory()
    threads = given_threads() or threads_per_worker(local_workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # settled already where something has computed in parallel
        torch.set_num_interop_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank))
    else:
        run_uninterrupted()


def _init(store: Any, rank: int, workers: int) -> None:
    import torch
    import torch.distributed as dist

    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=workers)


def _meet(context: RankContext) -> Any:
    """Connect to the launcher's store. Raises RequestError where the other workers do not come."""
    from torch.distributed import PrefixStore, rendezvous  # type: ignore[attr-defined]

    seconds = meet_seconds()
    begin = time.monotonic()
    try:
        if context.elastic or context.rank:
            _await_port(context, begin + seconds)
        store, _, _ = next(rendezvous("env://", timeout=timedelta(seconds=seconds)))
    except (OSError, RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError: nobody answers
        raise RequestError(
            f"rank {context.rank} of {context.workers} (RANK, WORLD_SIZE): the other workers did not meet at "
            f"{context.address}:{context.port} within {seconds:g} s ({_first_line(error)}): start all of them, or "
            "unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT to start local workers"
        ) from error
    # torchrun keeps its store over restarts, and what the last attempt wrote there must not be read again
    return PrefixStore(f"shardwise/{context.restarts}", store)


def _await_port(context: RankContext, end: float) -> None:
    """Wait until something answers at the meeting point; torch's own attempts fill the screen. Raises OSError."""
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((context.address, context.port), timeout=max(left, 0.1)).close()
        except OSError:
            if left <= 0:
                raise
            time.sleep(0.1)
        else:
            return


def meet_seconds() -> float:
    """Return how long workers wait for each other, in seconds. Raises RequestError where the setting is no number."""
    text = os.environ.get(MEET_SETTING, str(MEET_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise RequestError(f"{MEET_SETTING}={text}: must be a number of seconds above 0")
    return seconds


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _leave_at_exit() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        rest()


def _loopback() -> dict[str, str]:
    """Return the environment in which gloo and NCCL talk over the loopback device: nobody else can reach it."""
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    return {name: loopback for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback}


def _runs(task: Path) -> bool:
    try:
        state = (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:  # it has ended
        return False
    return state == "R"
