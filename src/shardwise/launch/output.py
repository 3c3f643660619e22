"""Standard output of a worker of another launcher: for the command's document alone, as with local workers.

What the workload's code prints goes to standard error, so that a document of JSON stays one.
"""

from __future__ import annotations

import os
import sys
from io import TextIOWrapper
from typing import TextIO

_own: TextIO | None = None


def keep_apart() -> None:
    """Send what is printed from now on to standard error, except to `document_stream`."""
    global _own
    if _own is not None:
        return
    _own = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    write_whole_lines()


def write_whole_lines() -> None:
    """Write what is printed from now on line by line, each line at once, so that those of two workers do not mix.

    Python writes a line and its end apart where PYTHONUNBUFFERED is set, and many lines at once into a file or a pipe.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(line_buffering=True, write_through=False)


def document_stream() -> TextIO:
    """Return the stream for the command's document: standard output as this process was started with it."""
    return _own or sys.stdout
