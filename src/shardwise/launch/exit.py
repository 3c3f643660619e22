"""Ends of a process: fast once it has loaded torch, together with its parent, and not by the workload's `os._exit`."""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import os
import signal
import sys
import threading
from collections.abc import Iterator
from os import _exit
from typing import NoReturn

PR_SET_PDEATHSIG = 1
"""Option of Linux's prctl(2), <sys/prctl.h>: set the signal that this process gets when its parent dies."""


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Let the kernel send this process a signal when its parent dies, for whatever reason (Linux only)."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, int(number))


@contextlib.contextmanager
def failing_exits() -> Iterator[None]:
    """Make `os._exit(0)` in the block end this process with a message and exit status 1.

    Exit status 0 would look as if the work had been done.
    """

    def fail(status: int) -> NoReturn:
        if status == 0:
            sys.stderr.write("shardwise: the workload's code called os._exit(0), the work was not done\n")
        _exit(status or 1)

    os._exit = fail
    try:
        yield
    finally:
        os._exit = _exit


def end(status: int) -> NoReturn:
    """End this process without finalizing the interpreter, which takes half a second once torch is loaded.

    The first steps of a regular exit still happen: wait for threads, call `atexit` functions, flush both streams.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None: it was closed before the program began
                stream.flush()
    except OSError:
        sys.exit(status)  # the interpreter reports the failed flush, and changes the exit status to 120
    _exit(status)
