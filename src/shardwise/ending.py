"""The end of a process that has loaded torch."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Iterator
from os import _exit
from typing import NoReturn


@contextlib.contextmanager
def failing_exits() -> Iterator[None]:
    """Let `os._exit(0)` in the block, which would count as work that is done, end this process with a word and 1."""

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
    """Ends this process without taking the interpreter apart, which takes half a second once torch is loaded.

    What the interpreter does first is done: it waits for threads, calls what is registered for the exit, and writes
    what is buffered.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before the program began
                stream.flush()
    except OSError:
        sys.exit(status)  # the interpreter says what could not be written, and makes the exit status 120
    _exit(status)
