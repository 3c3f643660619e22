"""What this process is doing, seen from another of its threads: in which operation, and whether it waits for others."""

from __future__ import annotations

import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

SHOWN_FRAMES = 12
"""Innermost frames of a stack that are shown."""

_IDLE = ("threading.py", "queue.py", "_base.py", "thread.py")
"""Files of the standard library in which a thread waits for another one."""

_PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Look:
    """What a process was doing at one moment.

    Attributes:
        waiting: it sleeps in a collective, a message or another operation of torch or Shardwise; else it computes, or
            is held up by something of its own (data, the workload's code, a file).
        operation: in words: `all_reduce`, `sleep_once (work.py:31)`.
        frame: the innermost frame.
    """

    waiting: bool
    operation: str
    frame: FrameType

    def stack(self) -> str:
        """Return the innermost frames as Python shows them, the innermost last."""
        return "".join(traceback.format_stack(self.frame, SHOWN_FRAMES))


def look() -> Look:
    """Look at the thread of this process that the training depends on: the main thread, or the one it waits for."""
    frames = sys._current_frames()
    main = threading.main_thread()
    thread, frame = main, frames[main.ident or 0]
    if Path(frame.f_code.co_filename).name in _IDLE:
        thread, frame = _working(frames) or (main, frame)
    waiting = _is_ours(frame.f_code.co_filename) and not _runs(thread)
    return Look(waiting, _operation(frame), frame)


def _working(frames: dict[int, FrameType]) -> tuple[threading.Thread, FrameType] | None:
    """Return a thread that loads data or writes a checkpoint right now; None where all are idle."""
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.daemon or thread is threading.main_thread():
            continue
        if Path(frame.f_code.co_filename).name not in _IDLE:
            return thread, frame
    return None


def _is_ours(file: str) -> bool:
    """Tell whether code of torch or Shardwise waits for other workers when it sleeps; loading data does not."""
    return _in_torch(file) or (file.startswith(_PACKAGE) and "/workload/" not in file)


def _in_torch(file: str) -> bool:
    return "/torch/" in file and "/torch/utils/data/" not in file


def _runs(thread: threading.Thread) -> bool:
    """Tell whether a thread computes, or would if it had a processor; False where the system does not say."""
    try:
        stat = Path(f"/proc/self/task/{thread.native_id}/stat").read_text()
    except OSError:
        return False
    return stat.rpartition(")")[2].split()[0] == "R"


def _operation(frame: FrameType) -> str:
    """Name what `frame` is in: a collective, the backward pass, else the innermost function that is not torch's."""
    outer: FrameType | None = frame
    operation = ""
    while outer is not None and _in_torch(outer.f_code.co_filename):
        if outer.f_code.co_filename.endswith("/distributed_c10d.py"):
            operation = outer.f_code.co_name
        elif outer.f_code.co_name == "_engine_run_backward":
            operation = operation or "the backward pass"
        outer = outer.f_back
    if operation:
        return operation
    shown = outer or frame
    return f"{shown.f_code.co_name} ({Path(shown.f_code.co_filename).name}:{shown.f_lineno})"
