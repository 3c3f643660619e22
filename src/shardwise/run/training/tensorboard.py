"""TensorBoard event files of a run, if TensorBoard is installed; a failure to write them never ends the run.

TensorBoard's own writer works in a thread that prints a traceback when the disk is full, and raises the error in the
training. This module writes the records itself: one event per step, with all its values.
"""

from __future__ import annotations

import contextlib
import logging
import os
import socket
import time
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 5.0
"""Seconds that an event may wait before it is written to its file."""

logger = logging.getLogger(__name__)


class EventFile:
    """Event file in a folder; writes nothing if TensorBoard is not installed or the file cannot be written.

    Args:
        folder: folder of the event file; it is made if it does not exist.
        done: number of steps before this file. Events of later steps in earlier files are discarded by TensorBoard.
            0: there are no earlier files.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self._folder = folder
        self._records: Any = None
        self._flushed = time.monotonic()
        if find_spec("tensorboard") is None:
            return
        with self._told():
            self._records = _opened(folder)
            self._write(file_version="brain.Event:2")
            if done:
                self._begin_after(done)
            self._records.flush()

    def add(self, step: int, values: Mapping[str, float | None]) -> None:
        """Write the values of a step by name; values that are None are left out."""
        if self._records is None:
            return
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items() if value is not None]
        with self._told():
            self._write(step=step, summary=Summary(value=scalars))
            if time.monotonic() > self._flushed + FLUSH_SECONDS:
                self._flushed = time.monotonic()
                self._records.flush()

    def close(self) -> None:
        """Write all waiting events and close the file."""
        if self._records is not None:
            with self._told():
                self._records.close()
        self._records = None

    def _begin_after(self, done: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())

    @contextlib.contextmanager
    def _told(self) -> Any:
        """Report the first failed write in one line, and write nothing more after it."""
        try:
            yield
        except OSError as error:
            logger.warning(
                "%s cannot be written: %s; the run goes on without TensorBoard's files", self._folder, error.strerror
            )
            records, self._records = self._records, None
            with contextlib.suppress(OSError, AttributeError):
                records.close()


def _opened(folder: Path) -> Any:
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
    return RecordWriter((folder / name).open("xb"))
