"""Signals to the parent of local workers: handlers only note them here, and `local` decides what to do."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT")
"""Signals that end a command and its workers, except ignored ones (`nohup`)."""


class Terminated(SystemExit):
    """Exit of this process because of a signal; `code` is 128 plus the signal's number, by the convention of shells."""


class Signals:
    """Context manager that notes signals, and restores the earlier handlers at its end; active only in the main thread.

    Attributes:
        stop: number of the signal that told this process to end; 0: none came.
        again: True if another such signal came after it.
    """

    def __init__(self) -> None:
        self.stop, self.again = 0, False
        self._muted = False
        self._before: dict[int, Callable[[int, FrameType | None], Any] | int | signal.Handlers | None] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for name in _ENDING:
                self._handle(getattr(signal, name), self._end)
            self._handle(signal.SIGINT, self._interrupt)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def mute(self) -> None:
        """Ignore Ctrl-C from now on, because everything is already being ended."""
        self._muted = True

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        before = signal.getsignal(number)
        if before not in (signal.SIG_IGN, None):  # None: a handler that C code installed
            self._before[number] = signal.signal(number, handler)

    def _end(self, number: int, _: FrameType | None) -> None:
        self.stop, self.again = self.stop or number, bool(self.stop)

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        if not self._muted:
            self._muted = True  # one is enough: a second Ctrl-C must not interrupt the shutdown of workers
            raise KeyboardInterrupt
