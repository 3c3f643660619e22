"""Memory of this worker: on a GPU that of tensors, else that of its process without the files it maps.

These (libraries, and data that is mapped) lie in memory once, however many workers there are.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
"""Where Linux says what a process uses."""

REFERENCES = Path("/proc/self/clear_refs")
"""Where Linux can be told to look for the peak anew; see proc(5)."""


def peak_memory(device: torch.device) -> int:
    """Bytes that this worker has used at most."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if STATUS.exists():  # getrusage would count the parent's memory from before this program was loaded
        return own_memory()[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def own_memory() -> tuple[int, int]:
    """(most, now): bytes of this process that are in memory, without mapped files; see proc(5)."""
    lines = dict(line.split(":", 1) for line in STATUS.read_text().splitlines())
    kilobytes = {name: int(lines[name].split()[0]) for name in ("VmHWM", "VmRSS", "RssFile")}
    return tuple(1024 * (kilobytes[name] - kilobytes["RssFile"]) for name in ("VmHWM", "VmRSS"))  # type: ignore[return-value]


def give_back() -> None:
    """Gives the system all memory of this process back that nothing needs any more."""
    gc.collect()
    if sys.platform == "linux":
        trim: Callable[[int], int] | None = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if trim is not None:
            trim(0)


def restart_peak() -> bool:
    """Lets the peak of this process begin anew at what it uses now; False where the system cannot."""
    with contextlib.suppress(OSError):
        REFERENCES.write_text("5")
        return True
    return False
