"""TensorBoard event files of a run.

TensorBoard's own writer works in a thread that prints a traceback when the disk is full, and raises the error in the
training. This module writes the records itself: one event per step, with all its values.
"""

from __future__ import annotations

import os
import socket
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

FLUSH_SECONDS = 5.0
"""Seconds that an event may wait before it is written to its file."""


class EventFile:
    """Event file in a folder.

    Args:
        folder: folder of the event file; it is made if it does not exist.
        done: number of steps before this file. Events of later steps in earlier files are discarded by TensorBoard.
            0: there are no earlier files.

    Raises:
        OSError: the file cannot be written; so do all methods.
    """

    def __init__(self, folder: Path, done: int) -> None:
        self._flushed = time.monotonic()
        self._records: Any = _opened(folder)
        self._write(file_version="brain.Event:2")
        if done:
            self._begin_after(done)
        self._records.flush()

    def step(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step by name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        scalars = [Summary.Value(tag=name, simple_value=value) for name, value in values.items()]
        self._write(step=step, summary=Summary(value=scalars))
        if time.monotonic() > self._flushed + FLUSH_SECONDS:
            self._flushed = time.monotonic()
            self._records.flush()

    def evaluation(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of an evaluation by name."""
        self.step(step, values)

    def close(self, *, failed: bool) -> None:
        """Write all waiting events and close the file; whether the run failed is not in it."""
        self._records.close()

    def _begin_after(self, done: int) -> None:
        from tensorboard.compat.proto.event_pb2 import SessionLog

        self._write(step=done + 1, session_log=SessionLog(status=SessionLog.START))

    def _write(self, **fields: Any) -> None:
        from tensorboard.compat.proto.event_pb2 import Event

        self._records.write(Event(wall_time=time.time(), **fields).SerializeToString())


def _opened(folder: Path) -> Any:
    from tensorboard.summary.writer.record_writer import RecordWriter

    folder.mkdir(parents=True, exist_ok=True)
    name = f"events.out.tfevents.{time.time_ns() // 10**9:010d}.{socket.gethostname()}.{os.getpid()}.{time.time_ns()}"
    return RecordWriter((folder / name).open("xb"))
