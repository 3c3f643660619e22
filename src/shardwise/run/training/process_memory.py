"""Memory of this worker: on a GPU that of its tensors, else that of its process without mapped files.

Mapped files (libraries and mapped data) are in memory only once for all workers of a host.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
"""File in which Linux reports the memory of this process."""

REFERENCES = Path("/proc/self/clear_refs")
"""File by which Linux resets the peak memory of this process; see proc(5)."""


def peak_memory(device: torch.device) -> int:
    """Return the peak memory of this worker in bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # getrusage would count the parent's memory from before this program was loaded
        return own_memory()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def own_memory() -> tuple[int, int]:
    """Return the peak and the current resident memory of this process in bytes, without mapped files; see proc(5)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    kilobytes = {name: int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssFile")}
    return tuple(1024 * (kilobytes[name] - kilobytes["RssFile"]) for name in ("VmHWM", "VmRSS"))  # type: ignore[return-value]


def give_back() -> None:
    """Return all free memory of this process to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


@contextlib.contextmanager
def only_new_garbage() -> Iterator[None]:
    """Let collections in the block pass over all older objects: looking through those of torch takes 0.1 s or more.

    Where somebody has frozen objects already, these stay frozen, and the others are collected as usual.
    """
    aside = gc.get_freeze_count() == 0
    if aside:
        gc.freeze()
    try:
        yield
    finally:
        if aside:
            gc.unfreeze()


def restart_peak() -> bool:
    """Reset the peak memory of this process to its current memory. Returns False if the system cannot."""
    with contextlib.suppress(OSError):
        REFERENCES.write_text("5")
        return True
    return False
