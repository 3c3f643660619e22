"""Threads of a worker that wake up do not interrupt others."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="other systems have other schedulers")

ASKED = """
import os, threading
from shardwise.launch.scheduling import run_uninterrupted

{before}
print(int(run_uninterrupted()), os.sched_getscheduler(0))
thread = threading.Thread(target=lambda: print(os.sched_getscheduler(0)))
thread.start()
thread.join()
"""


def asked(before: str = "") -> list[int]:
    """(whether it was done, policy of this thread, policy of one that it starts)."""
    program = ASKED.format(before=before)
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return [int(value) for value in done.stdout.split()]


def test_threads_are_scheduled_in_batches() -> None:
    assert asked() == [1, os.SCHED_BATCH, os.SCHED_BATCH]


def test_what_a_person_chose_stays() -> None:
    idle = "os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))"
    assert asked(idle) == [0, os.SCHED_IDLE, os.SCHED_IDLE]


def test_a_system_that_forbids_it_is_no_error() -> None:
    forbidden = """
def refuse(*ignored):
    raise PermissionError(1, "Operation not permitted")

os.sched_setscheduler = refuse
"""
    assert asked(forbidden) == [0, os.SCHED_OTHER, os.SCHED_OTHER]
