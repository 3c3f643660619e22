"""Standard output of a worker of another launcher: for the command's document alone, as with local workers.

What the workload's code prints goes to standard error, line by line, so that the lines of two workers do not mix and a
document of JSON stays one.
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
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)


def document_stream() -> TextIO:
    """Return the stream for the command's document: standard output as this process was started with it."""
    return _own or sys.stdout
