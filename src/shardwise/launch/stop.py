"""Hear in a worker that the job is to stop: by a signal, which its launcher passes on."""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from types import FrameType

_requested = 0


def listen(grace: float) -> None:
    """Note SIGTERM and SIGHUP from now on, in place of ending at once; `grace` seconds later this process ends.

    A second one changes nothing: schedulers send it to all processes of a job, and the launcher passes it on besides.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_note, grace))


def requested() -> int:
    """Return the number of the signal that asked this worker to stop; 0 where none did."""
    return _requested


def _note(grace: float, number: int, _: FrameType | None) -> None:
    global _requested
    if _requested:
        return
    _requested = number
    timer = threading.Timer(grace, os._exit, (128 + number,))
    timer.daemon = True
    timer.start()
