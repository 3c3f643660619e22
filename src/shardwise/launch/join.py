"""Joining of a worker to its job: set its device and threads, join the process group, and leave it at the end."""

from __future__ import annotations

import atexit
import contextlib
import os
import socket
import threading
import time
from functools import partial
from pathlib import Path
from typing import Any

from shardwise.errors import RequestError, StrategyError, one_line
from shardwise.launch import watch
from shardwise.launch.allocator import keep_memory
from shardwise.launch.board import StoreBoard, board_of
from shardwise.launch.context import given_threads, rank_context
from shardwise.launch.exit import die_with_parent
from shardwise.launch.ranks import LOOPBACK, TORCHRUN, RankContext
from shardwise.launch.scheduling import run_uninterrupted, state_of
from shardwise.launch.shared_memory.choice import transport

TASKS = Path("/proc/self/task")
"""Folder in which Linux lists the threads of this process."""

GLOO_TRANSPORT = "GLOO_DEVICE_TRANSPORT"
"""Environment variable with which gloo is asked for connections with TLS, if torch was built with them."""

LOOK_SECONDS, QUIET_LOOKS = 0.005, 3
"""Seconds between two looks at other threads, and number of looks in a row that must find none running."""


def threads_per_worker(workers: int) -> int:
    """Return the intra-op threads of each of `workers` processes that share this machine's cores evenly; at least 1."""
    return max(1, _cores() // workers)


def crowding(workers: int) -> str:
    """Return one line if this host has fewer cores than its share of `workers`, which compute on CPUs, else nothing."""
    context = rank_context()
    here = workers if context is None else context.local_workers or context.workers
    if here <= (cores := _cores()):
        return ""
    return (
        f"{here} workers share {cores} core{'s' * (cores > 1)}: they take turns, so a step takes longer than on "
        f"--workers {cores}"
    )


def _cores() -> int:
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def join_local(store: str, rank: int, workers: int) -> None:
    """Make this process one of the local `workers`, which meet over the file `store` instead of a network port."""
    from torch.distributed import FileStore  # type: ignore[attr-defined]

    _start(str(rank), workers)
    os.environ.update(_loopback())
    _init(FileStore(store, workers), rank, workers)


def join_alone() -> None:
    """Make this process a group of one worker, which listens on the loopback device alone."""
    from torch.distributed import HashStore  # type: ignore[attr-defined]

    for variable, device in _loopback().items():
        os.environ.setdefault(variable, device)
    _init(HashStore(), 0, 1)
    atexit.register(_leave_at_exit)


def join_launcher(workers: int | None = None) -> None:
    """Make this process a worker of the launcher that started it, until it ends; does nothing if it already is one.

    Args:
        workers: number of workers that the strategy needs; None: any number.

    Raises:
        StrategyError: the launcher did not start `workers` workers.
        RequestError: the other workers did not join within `meeting.meet_seconds()`, this host has too few GPUs, or
            `launch.shared_memory.choice.SETTING` is wrong.
    """
    import torch.distributed as dist

    from shardwise.launch import host_watch  # only workers need it, and every start would take longer

    context = rank_context()
    assert context is not None
    if workers is not None and workers != context.workers:
        raise StrategyError(
            f"{workers} workers are asked for, the launcher started {context.workers}: use {context.workers}"
        )
    if dist.is_initialized():
        return
    _check_gpus(context.local_workers or context.workers)
    transport()  # raises for a wrong setting before the workers meet
    check_encryption()
    host_watch.host_seconds()  # and so does this
    end_with_launcher(context)
    _start(str(context.local_rank), context.local_workers or context.workers)
    if context.one_host:
        for variable, device in _loopback().items():
            os.environ.setdefault(variable, device)
    from shardwise.launch.meeting import meet  # only workers need it, and every start would take longer
    from shardwise.launch.places import take_place

    met, board = meet(context), board_of(context)
    context = take_place(context, met.store)
    host_watch.settle(context, met, board)
    atexit.register(host_watch.leave)
    _init(met.store, context.rank, context.workers)
    watch.settle(context.rank, context.workers, board, partial(_report, board))
    atexit.register(_leave_at_exit)


def _report(board: StoreBoard, error: BaseException) -> None:
    """Report that the job hangs, upon which this process ends itself."""
    from shardwise.launch import host_watch

    watch.report_here(board, error)
    host_watch.leave()


def end_with_launcher(context: RankContext) -> None:
    """Let this process end with the launcher that is its parent; does nothing where the launcher sees to it itself."""
    if context.engine in (TORCHRUN, "mpi"):
        die_with_parent()


def leave() -> None:
    """Destroy the process group once all workers are done with it. Collective."""
    import torch
    import torch.distributed as dist

    # a worker that left while others still send would look like a dead one to them
    dist.all_reduce(torch.zeros(1))
    dist.destroy_process_group()


def rest(seconds: float = 1.0) -> None:
    """Wait, at most `seconds`, until no other thread of this process runs.

    Gloo's threads release a sent tensor a moment after the thread that waited for it goes on. If they need the
    interpreter for that while it shuts down, the process aborts (pytorch/pytorch#179291).
    """
    own, end, quiet = threading.get_native_id(), time.monotonic() + seconds, 0
    while quiet < QUIET_LOOKS and time.monotonic() < end:
        time.sleep(LOOK_SECONDS)  # releases the interpreter's lock to threads that wait for it
        quiet = 0 if any(state_of(task) == "R" for task in TASKS.glob("*") if task.name != str(own)) else quiet + 1


def check_encryption() -> None:
    """Check that gloo can do what GLOO_DEVICE_TRANSPORT asks of it. Raises RequestError: torch's wheels have no TLS."""
    if os.environ.get(GLOO_TRANSPORT) != "TCP_TLS":
        return
    from torch.distributed import ProcessGroupGloo

    try:
        ProcessGroupGloo.create_device(hostname=LOOPBACK)
    except RuntimeError as error:
        raise RequestError(
            f"{GLOO_TRANSPORT}=TCP_TLS: {one_line(str(error))}: this build of torch connects workers without TLS: "
            "unset it, and let the hosts reach each other over an encrypted network (WireGuard, IPsec), whose device "
            "GLOO_SOCKET_IFNAME names"
        ) from error


def _start(local_rank: str, local_workers: int) -> None:
    """Set the allocator, threads and device of this worker before it computes anything."""
    import torch

    keep_memory()
    threads = given_threads() or threads_per_worker(local_workers)
    os.environ["OMP_NUM_THREADS"] = str(threads)
    torch.set_num_threads(threads)
    with contextlib.suppress(RuntimeError):  # fixed already if something has computed in parallel
        torch.set_num_interop_threads(1)
    if torch.cuda.is_available():
        torch.cuda.set_device(int(local_rank))
    else:
        run_uninterrupted()


def _check_gpus(local_workers: int) -> None:
    """Check that there is a GPU for each worker of this host, or none. Raises RequestError."""
    import torch

    count = torch.cuda.device_count()
    if 0 < count < local_workers:
        raise RequestError(
            f"{local_workers} workers were started on a host with {count} GPU{'s' * (count > 1)}: start {count} there, "
            "or set CUDA_VISIBLE_DEVICES to an empty text to compute on the CPU"
        )


def _init(store: Any, rank: int, workers: int) -> None:
    import torch.distributed as dist

    from shardwise.launch.shared_memory.backend import backend

    dist.init_process_group(backend(), store=store, rank=rank, world_size=workers)


def _leave_at_exit() -> None:
    import torch.distributed as dist

    if dist.is_initialized():
        dist.destroy_process_group()
        rest()


def _loopback() -> dict[str, str]:
    """Return the environment variables that restrict gloo and NCCL to the loopback device, unreachable from outside."""
    names = {name for _, name in socket.if_nameindex()}
    loopback = next((name for name in ("lo", "lo0") if name in names), None)
    return {name: loopback for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME") if loopback}
