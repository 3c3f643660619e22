"""First steps of a command: make its import path and its standard streams safe.

This module imports only modules that the interpreter has already loaded, because the import path is not safe yet.
"""

from __future__ import annotations

import os
import sys

CLOSED = 2
"""Exit status if standard output or standard error is closed."""


def leave_out_working_directory() -> None:
    """Remove the working directory from the import path, where `python -m` or an empty entry of PYTHONPATH puts it.

    A downloaded folder may hold a `transformers/` or a `torch.py`, which would run in place of the installed one.
    Folders that PYTHONPATH names by their absolute path stay, and so does the folder that Shardwise runs from.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # the working directory was removed
        return
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    trusted = [os.path.dirname(os.path.dirname(__file__)), *filter(os.path.isabs, named)]
    if here not in map(os.path.realpath, trusted):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]


def check_streams() -> None:
    """End the process with one line if standard output or standard error is closed.

    Closed descriptors 0, 1 and 2 are opened on /dev/null first. Otherwise the next file or socket to be opened would
    get one of these numbers, and printed text would go into it.
    """
    output, errors = sys.stdout, sys.stderr
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # `open` takes the lowest free number
    if output is not None and errors is not None:
        return
    name, other = ("output", errors) if output is None else ("error", output)
    if other is not None:
        other.write(f"shardwise: standard {name} is closed: send it to a file, or to {os.devnull}\n")
        other.flush()
    sys.exit(CLOSED)
