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
_TRANSPORT = str(Path(__file__).parent / "shared_memory")


@dataclass(frozen=True, slots=True)
class Activity:
    """Activity of a process at one moment.

    It has no frame: a frame keeps its local variables alive, which are tensors of the step that runs.

    Attributes:
        waiting: True if it sleeps in a collective, a point-to-point message or another operation of torch or Shardwise.
            Otherwise it computes, or is blocked by something of its own (data, the workload's code, a file).
        operation: name of the operation: `all_reduce`, `sleep_once (work.py:31)`.
        stack: the innermost frames in the format of a Python traceback, the innermost last; empty if not asked for.
    """

    waiting: bool
    operation: str
    stack: str = ""


def look(*, stack: bool = False) -> Activity:
    """Inspect the thread that the training depends on: the main thread, or the thread that it waits for.

    Args:
        stack: also format its stack, which reads source files.
    """
    thread, frame = _watched()
    ours, operation = _is_ours(frame.f_code.co_filename), _operation(frame)
    text = "".join(traceback.format_stack(frame, SHOWN_FRAMES)) if stack else ""
    del frame  # before a file is read, during which the main thread goes on
    return Activity(ours and not _runs(thread), operation, text)


def _watched() -> tuple[threading.Thread, FrameType]:
    """Return the thread that the training depends on, and its innermost frame."""
    frames = sys._current_frames()
    main = threading.main_thread()
    frame = frames[main.ident or 0]
    idle = Path(frame.f_code.co_filename).name in _IDLE
    found = (_working(frames) if idle else None) or (main, frame)
    frames.clear()  # this function's own frame is among them, a cycle that would keep all of them until a collection
    return found


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
    """Name the operation of a frame: a collective, the backward pass, else the innermost function outside torch.

    What runs a collective through shared memory counts as part of torch.
    """
    outer: FrameType | None = frame
    operation = ""
    while outer is not None and (
        _in_torch(outer.f_code.co_filename) or outer.f_code.co_filename.startswith(_TRANSPORT)
    ):
        if outer.f_code.co_filename.endswith("/distributed_c10d.py"):
            operation = outer.f_code.co_name
        elif outer.f_code.co_name == "_engine_run_backward":
            operation = operation or "the backward pass"
        outer = outer.f_back
    if operation:
        return operation
    shown = outer or frame
    return f"{shown.f_code.co_name} ({Path(shown.f_code.co_filename).name}:{shown.f_lineno})"
