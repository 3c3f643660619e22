"""How the threads of a worker share its cores: one that wakes up does not interrupt another.

Gloo sends from one thread and receives in another, and both need the lock of a connection. Where the kernel lets the
receiving thread interrupt the sending one in the middle, the receiver tries for the lock again and again until the next
tick of the clock, 4 ms where that ticks 250 times a second. What Linux calls batch scheduling takes nobody's share of
the cores; it only lets a thread run on when another wakes up (sched(7)).
"""

from __future__ import annotations

import os
import sys


def run_uninterrupted() -> bool:
    """Puts this thread, and those that it will start, under batch scheduling; anybody may do that.

    Returns:
        whether it did: on Linux, unless its user chose something else (`chrt`).
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # where a sandbox forbids to ask, all goes on as it would have
        return False
    return True
