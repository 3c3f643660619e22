"""What a command does before anything else: its import path and its standard streams are made safe.

Nothing but what the interpreter has loaded already is imported here, for the import path is not safe yet.
"""

from __future__ import annotations

import os
import sys

CLOSED = 2
"""Exit status where a stream is closed that results or errors are written to."""


def leave_out_working_directory() -> None:
    """Take the working directory off the import path, where `python -m` or an empty entry of PYTHONPATH puts it.

    A downloaded folder may hold a `transformers/` or a `torch.py`, which would run in place of the installed one. What
    PYTHONPATH names by its full path stays, and the folder that Shardwise itself runs from.
    """
    try:
        here = os.path.realpath(os.getcwd())
    except FileNotFoundError:  # it was removed meanwhile
        return
    named = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    trusted = [os.path.dirname(os.path.dirname(__file__)), *filter(os.path.isabs, named)]
    if here not in map(os.path.realpath, trusted):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry) != here]


def check_streams() -> None:
    """End the process with one line where standard output or standard error is closed.

    Their numbers, and that of standard input, are given to /dev/null: else the next file or socket that is opened gets
    one of them, and what is printed goes into it.
    """
    output, errors = sys.stdout, sys.stderr
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if output is not None and errors is not None:
        return
    name, other = ("output", errors) if output is None else ("error", output)
    if other is not None:
        other.write(f"shardwise: standard {name} is closed: send it to a file, or to {os.devnull}\n")
        other.flush()
    sys.exit(CLOSED)
