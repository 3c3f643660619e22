"""The end of a process that has loaded torch."""

from __future__ import annotations

import atexit
import contextlib
import os
import sys
import threading
from typing import NoReturn


def end(status: int) -> NoReturn:
    """Ends this process without taking the interpreter apart, which takes half a second once torch is loaded.

    What the interpreter does first is done: it waits for threads, calls what is registered for the exit, and writes
    what is buffered.
    """
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()
    os._exit(status)
