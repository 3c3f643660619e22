"""Batch scheduling for the threads of a worker: a thread that wakes up does not preempt a running one.

Gloo sends from one thread and receives in another, and both need the lock of a connection. If the kernel lets the
receiving thread preempt the sending one while it holds the lock, the receiver spins until the next tick of the clock
(4 ms at 250 ticks per second). Linux's batch scheduling keeps each thread's share of the cores; it only lets a thread
run on when another one wakes up (sched(7)).
"""

from __future__ import annotations

import os
import sys
from pathlib import Path


def run_uninterrupted() -> bool:
    """Put this thread, and the threads that it will start, under batch scheduling; this needs no privileges.

    Returns:
        True if it did: on Linux, unless the user chose another policy (`chrt`) or a sandbox forbids the call.
    """
    if sys.platform != "linux" or os.sched_getscheduler(0) != os.SCHED_OTHER:
        return False
    try:
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    except OSError:  # a sandbox forbids the call: go on with the default policy
        return False
    return True


def state_of(task: Path) -> str:
    """Return the state letter of a process or thread (R, S, T, ...) from its folder in /proc; empty if it has ended.

    Systems without /proc give an empty string too.
    """
    try:
        return (task / "stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
