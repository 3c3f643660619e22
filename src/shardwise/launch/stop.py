"""Request to stop, as a worker receives it: by a signal that its launcher passes on.

mpirun ends its workers within a second on SIGTERM, and passes on SIGUSR2: both mean the same here.
"""

from __future__ import annotations

import os
import signal
import threading
from functools import partial
from types import FrameType

_requested = 0


def listen(grace: float) -> None:
    """Note SIGTERM, SIGHUP and SIGUSR2 from now on instead of ending; one ends this process after `grace` seconds.

    A second signal changes nothing: schedulers signal all processes of a job, and the launcher passes its signal on.
    """
    if threading.current_thread() is not threading.main_thread():
        return
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGUSR2):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, partial(_note, grace))


def requested() -> int:
    """Return the number of the signal that asked this worker to stop. Returns 0 if none did."""
    return _requested


def _note(grace: float, number: int, _: FrameType | None) -> None:
    global _requested
    if _requested:
        return
    _requested = signal.SIGTERM if number == signal.SIGUSR2 else number
    timer = threading.Timer(grace, os._exit, (128 + _requested,))
    timer.daemon = True
    timer.start()
