"""File `messages.jsonl` of a run: how each training in the folder began and ended, and what it told the user.

Each line is a JSON object with its `time` (seconds since 1970) and its `kind`:

    begin     a training begins: `step` and `total_steps` (None: unknown), `predicted_seconds`,
              `predicted_memory_bytes`, `workers`, `host`
    note      a line for the user: `text`
    warning   a warning: `text`
    memory    the peak memory of rank 0 so far: `step`, `bytes`
    end       the training ended: `how` (one of ENDS), `text`

Rank 0 writes all lines but the last, which the process that started the workers writes. A process that is killed
writes none.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shardwise.errors import one_line
from shardwise.launch.context import is_first
from shardwise.launch.signals import Terminated

MESSAGES = "messages.jsonl"

FINISHED, STOPPED, INTERRUPTED, FAILED = ENDS = ("finished", "stopped", "interrupted", "failed")
"""Ends of a training: it is done, a signal ended it, Ctrl-C did, or an error did."""


def add_message(folder: Path, kind: str, **fields: Any) -> None:
    """Append a line to the messages of a run. One that cannot be written is left out: it must not end a run."""
    line = json.dumps({"time": round(time.time(), 3), "kind": kind, **fields}) + "\n"
    with contextlib.suppress(OSError):
        flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
        file = os.open(folder / MESSAGES, flags, 0o644)
        try:
            os.write(file, line.encode())  # at once, so that lines of two processes do not mix
        finally:
            os.close(file)


@contextlib.contextmanager
def end_noted(folder: Path | None) -> Iterator[None]:
    """Note how the training in the block ended; under an outer launcher, on rank 0 only."""
    try:
        yield
    except BaseException as error:
        note_end(folder, error)
        raise
    note_end(folder)


def note_end(folder: Path | None, error: BaseException | None = None) -> None:
    """Note how a training ended, see `end_noted`; `error` is what ended it, None: it is done."""
    if folder is not None and is_first():
        how, text = _told(error)
        add_message(folder, "end", how=how, text=text)


def _told(error: BaseException | None) -> tuple[str, str]:
    if error is None:
        return FINISHED, ""
    if isinstance(error, Terminated):
        return STOPPED, ""
    if isinstance(error, KeyboardInterrupt):
        return INTERRUPTED, ""
    return FAILED, one_line(str(error)) or type(error).__name__


@contextlib.contextmanager
def warnings_noted(folder: Path | None) -> Iterator[None]:
    """Add the warnings that Shardwise logs in the block to the messages of a run, besides where they go anyway."""
    if folder is None:
        yield
        return
    handler = _WarningHandler(folder)
    logger = logging.getLogger("shardwise")
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


class _WarningHandler(logging.Handler):
    """Handler that adds warnings to the messages of a run."""

    def __init__(self, folder: Path) -> None:
        super().__init__(logging.WARNING)
        self._folder = folder

    def emit(self, record: logging.LogRecord) -> None:
        """Add a warning to the messages; print it if nobody else handles it, as `logging` does without this handler."""
        add_message(self._folder, "warning", text=one_line(record.getMessage()))
        others = (*logging.getLogger("shardwise").handlers, *logging.getLogger().handlers)
        if all(isinstance(each, _WarningHandler) for each in others) and logging.lastResort is not None:
            logging.lastResort.handle(record)
