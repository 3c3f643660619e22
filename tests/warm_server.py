"""Program of the server of `warm`: imports modules once, and forks a process for each order that comes.

python tests/warm_server.py SOCKET MODULE ...
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import sys
import traceback
from functools import partial
from typing import Any, NoReturn

import warm

OPEN_FILES = 4096
"""Descriptors from 3 up to this one are closed in a forked process."""


def serve(address: str) -> None:
    """Fork what is ordered until standard input closes, then end all that still runs."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)
    woken, wake = socket.socketpair()
    wake.setblocking(False)
    signal.set_wakeup_fd(wake.fileno())
    signal.signal(signal.SIGCHLD, lambda *_: None)
    processes: dict[int, socket.socket] = {}
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    while True:
        ready = select.select([0, listener.fileno(), woken.fileno()], [], [])[0]
        if 0 in ready:
            break
        if woken.fileno() in ready:
            woken.recv(OPEN_FILES)
            reap(processes)
        if listener.fileno() in ready:
            connection = listener.accept()[0]
            processes[fork(connection)] = connection
    for process in processes:
        os.kill(process, signal.SIGKILL)


def fork(connection: socket.socket) -> int:
    """Receive an order, fork a process for it, and answer with its number."""
    head, streams, _, _ = socket.recv_fds(connection, warm.LENGTH.size, 3 + warm.MOST_PASSED)
    (length,) = warm.LENGTH.unpack(head)
    order = json.loads(connection.recv(length, socket.MSG_WAITALL))
    process = os.fork()
    if process == 0:
        become(order, streams)
    for stream in streams:
        os.close(stream)
    connection.sendall(warm.NUMBER.pack(process))
    return process


def reap(processes: dict[int, socket.socket]) -> None:
    """Send the exit status of each process that has ended to who started it, if that is still there."""
    for process in list(processes):
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            with contextlib.suppress(OSError), processes.pop(process) as connection:
                connection.sendall(warm.NUMBER.pack(os.waitstatus_to_exitcode(status)))


def become(order: dict[str, Any], streams: list[int]) -> NoReturn:
    """Make this forked process the one that was ordered, run its program, and end it."""
    status = 1
    try:
        settle(order, streams)
        run(order["arguments"])
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    try:
        from shardwise.launch.exit import end

        end(status)
    finally:
        os._exit(120)  # as of an interpreter that could not write what was left


def settle(order: dict[str, Any], streams: list[int]) -> None:
    """Take over streams, folder and environment, and be as an interpreter is that has just started."""
    import numpy as np
    import torch

    signal.set_wakeup_fd(-1)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    if order["session"]:
        os.setsid()
    for number, stream in enumerate(streams[:3]):
        os.dup2(stream, number)
    kept = 2
    for number, descriptor in zip(order["passed"], streams[3:], strict=True):
        os.dup2(descriptor, number)
        os.closerange(3, number)
        kept = number
    os.closerange(kept + 1, OPEN_FILES)
    assert order["environment"].get("PYTHONPATH") == os.environ.get("PYTHONPATH"), "read when the server started"
    os.environ.clear()
    os.environ.update(order["environment"])
    tell_environment()
    os.chdir(order["folder"])
    random.seed()
    np.random.seed()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", len(os.sched_getaffinity(0)))))


def start_workers_here(address: str) -> None:
    """Let Shardwise and torchrun start their workers by the server at `address`, in all processes that it forks."""
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    setattr(subprocess_handler, "Popen", partial(warm.Started, address=address))  # noqa: B010  # mypy: no such attribute
    warm.start_here(address)


def tell_environment() -> None:
    """Hold the environment in a file that others find by /proc, where `environ` stays that of the server."""
    number = os.memfd_create(warm.ENVIRONMENT)
    os.write(number, b"\0".join(f"{name}={value}".encode() for name, value in os.environ.items()))


def run(arguments: list[str]) -> None:
    """Run `-m MODULE ...` or `SCRIPT ...` as the main module; `-u` may precede it."""
    if arguments[0] == "-u":
        sys.stdout.reconfigure(write_through=True)  # type: ignore[union-attr]
        arguments = arguments[1:]
    if arguments[0] == "-m":
        sys.argv[:] = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv[:] = arguments
        sys.path.insert(0, os.path.dirname(os.path.realpath(arguments[0])))
        runpy.run_path(arguments[0], run_name="__main__")


if __name__ == "__main__":
    del sys.path[0]  # this folder: programs that are run must not import tests by their bare names
    for name in sys.argv[2:]:
        importlib.import_module(name)
    start_workers_here(sys.argv[1])
    gc.collect()
    gc.freeze()
    serve(sys.argv[1])
