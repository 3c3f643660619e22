"""The end of a process that has loaded torch."""

from __future__ import annotations

import atexit
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
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # closed before the program began
                stream.flush()
    except OSError:
        sys.exit(status)  # the interpreter says what could not be written, and makes the exit status 120
    os._exit(status)
