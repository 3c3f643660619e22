"""Gate of a worker: its training waits there until the parent lets it go on, so that several trainings take turns.

    worker   reports that it waits   ────▶  parent   opens the gate once all workers of this training wait
             sleeps, computes nothing ◀────

A worker that nobody gave a gate passes it at once.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from shardwise.launch import watch

ALIVE_SECONDS = 1.0
"""Seconds between two notes of a waiting worker that it does not hang."""

_report: Callable[[dict[str, Any]], None] | None = None
_opened = threading.Semaphore(0)


def settle(report: Callable[[dict[str, Any]], None]) -> None:
    """Give this worker a gate. `report` sends a JSON-able value to the parent."""
    global _report
    _report = report


def open_gate() -> None:
    """Let the worker pass once; the thread that hears the parent calls it."""
    _opened.release()


def pass_gate(value: dict[str, Any]) -> None:
    """Report that this worker waits, with a value for the parent, and wait until the gate is opened."""
    if _report is None:
        return
    _report(value)
    while not _opened.acquire(timeout=ALIVE_SECONDS):
        watch.alive()
    watch.alive()
