"""Memory of this worker: on a GPU that of its tensors, else that of its process without mapped files.

Mapped files (libraries and mapped data) are in memory only once for all workers of a host.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
import resource
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
"""File in which Linux reports the memory of this process."""

MEMORY = Path("/proc/meminfo")
"""File in which Linux reports the memory of the system."""

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


def free_memory(device: torch.device) -> int:
    """Return the bytes that a process can still allocate on `device`; on the CPU what the system has available."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if MEMORY.exists():
        lines = dict(line.split(":", 1) for line in MEMORY.read_text().splitlines())
        return 1024 * int(lines["MemAvailable"].split()[0])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def give_back() -> None:
    """Return all free memory of this process to the system."""
    gc.collect()
    if sys.platform == "linux":
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def forget_peak(device: torch.device) -> None:
    """Return free memory to the system and reset the peak memory of this worker, if the system can.

    Engines refer to themselves through their hooks, so one that is no longer used keeps its memory until a collection.
    """
    give_back()
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
    else:
        restart_peak()


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
