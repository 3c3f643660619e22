"""Inspection of the main thread from another thread: the operation it is in, and whether it waits for other workers."""

from __future__ import annotations

import sys
import threading
import traceback
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from shardwise.launch.scheduling import state_of

SHOWN_FRAMES = 12
"""Number of innermost frames that a printed stack has."""

_IDLE = ("threading.py", "queue.py", "_base.py", "thread.py")
"""Files of the standard library in which a thread waits for another one."""

_PACKAGE = str(Path(__file__).parents[1])


@dataclass(frozen=True, slots=True)
class Activity:
    """Activity of a process at one moment.

    Attributes:
        waiting: True if it sleeps in a collective, a point-to-point message or another operation of torch or Shardwise.
            Otherwise it computes, or is blocked by something of its own (data, the workload's code, a file).
        operation: name of the operation: `all_reduce`, `sleep_once (work.py:31)`.
        frame: the innermost frame.
    """

    waiting: bool
    operation: str
    frame: FrameType

    def stack(self) -> str:
        """Return the innermost frames in the format of a Python traceback, the innermost last."""
        return "".join(traceback.format_stack(self.frame, SHOWN_FRAMES))


def look() -> Activity:
    """Inspect the thread that the training depends on: the main thread, or the thread that it waits for."""
    frames = sys._current_frames()
    main = threading.main_thread()
    thread, frame = main, frames[main.ident or 0]
    if Path(frame.f_code.co_filename).name in _IDLE:
        thread, frame = _working(frames) or (main, frame)
    waiting = _is_ours(frame.f_code.co_filename) and not _runs(thread)
    return Activity(waiting, _operation(frame), frame)


def _working(frames: dict[int, FrameType]) -> tuple[threading.Thread, FrameType] | None:
    """Return a thread that loads data or writes a checkpoint right now, and its frame. Returns None if all are idle."""
    for thread in threading.enumerate():
        frame = frames.get(thread.ident or 0)
        if frame is None or thread.daemon or thread is threading.main_thread():
            continue
        if Path(frame.f_code.co_filename).name not in _IDLE:
            return thread, frame
    return None


def _is_ours(file: str) -> bool:
    """Return whether a thread that sleeps in `file` waits for other workers: true of torch and Shardwise.

    Code that loads data is excluded, because it sleeps for other reasons.
    """
    return _in_torch(file) or (file.startswith(_PACKAGE) and "/workload/" not in file)


def _in_torch(file: str) -> bool:
    return "/torch/" in file and "/torch/utils/data/" not in file


def _runs(thread: threading.Thread) -> bool:
    """Return whether a thread is running or runnable. Returns False on systems without /proc."""
    return state_of(Path("/proc/self/task", str(thread.native_id))) == "R"


def _operation(frame: FrameType) -> str:
    """Name the operation of a frame: a collective, the backward pass, else the innermost function outside torch."""
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
