"""Signals to the process that has local workers: what to do about them is decided in one place, `local`."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

_ENDING = ("SIGTERM", "SIGHUP", "SIGQUIT")
"""Signals that end a command and its workers, but for those that its user has it ignore (`nohup`)."""


class Terminated(SystemExit):
    """This process was told to end by a signal; `code` is 128 and the number of the signal, as shells have it."""


class Signals:
    """Handles signals while it is open; handlers that were there before are put back. Only in the main thread.

    Attributes:
        stop: number of the signal by which this process was told to end; 0: none came.
        again: another one came after it.
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
        """Let signals from now on do nothing more: everything is being ended already."""
        self._muted = True

    def _handle(self, number: int, handler: Callable[[int, FrameType | None], None]) -> None:
        before = signal.getsignal(number)
        if before not in (signal.SIG_IGN, None):  # None: set by code that is not Python's
            self._before[number] = signal.signal(number, handler)

    def _end(self, number: int, _: FrameType | None) -> None:
        self.stop, self.again = self.stop or number, bool(self.stop)

    def _interrupt(self, number: int, _: FrameType | None) -> None:
        if not self._muted:
            self._muted = True  # the first is enough: a second one must not break into the ending of workers
            raise KeyboardInterrupt
