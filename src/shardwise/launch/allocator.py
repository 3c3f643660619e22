"""Settings of glibc's allocator by which a worker keeps the memory of freed tensors for the tensors of the next step.

A training step frees all of its activations, and the next step allocates as much again. By default glibc returns large
blocks to the system, which must then clear every page anew: up to a third of a step on a CPU (docs/how-it-works.md).

torch asks for aligned memory. glibc cuts it from a larger block and puts the rest into caches of small blocks. A cached
block does not merge with its neighbour when that is freed, so the hole is slightly too small for a tensor of equal
size, and the process grows to several times the size of its tensors. Without these caches the holes merge again. The
cache of each thread can be switched off only when a process starts.
"""

from __future__ import annotations

import ctypes
import os
import platform

# malloc.h of glibc; see mallopt(3)
M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = 1, -1, -2, -3

LARGEST = 2**30
"""Size in bytes from which a freed tensor still returns to the system: its memory would hardly fit another tensor."""

PAD = 2**26
"""Smallest number of bytes that the allocator requests from the system at a time."""


TUNABLES = "GLIBC_TUNABLES"
WITHOUT_CACHES = "glibc.malloc.tcache_count=0"
"""Value of TUNABLES for a process that is about to start: no per-thread caches of small blocks."""


def starting() -> dict[str, str]:
    """Return the environment variables to start a worker with; empty if `keep_memory` would do nothing."""
    return {TUNABLES: WITHOUT_CACHES} if _is_ours() else {}


def _is_ours() -> bool:
    """Return whether this process uses glibc's allocator and its user has not configured it."""
    chosen = any(name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ)
    tuned = os.environ.get(TUNABLES, WITHOUT_CACHES) != WITHOUT_CACHES
    return not chosen and not tuned and platform.libc_ver()[0] == "glibc"


def keep_memory() -> bool:
    """Let this process keep the memory that it frees, for its next allocations.

    Returns:
        True if it does: on Linux with glibc, unless the user chose otherwise (`MALLOC_...` in the environment, another
        allocator by `LD_PRELOAD`).
    """
    if not _is_ours():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, PAD), (M_MXFAST, 0))  # -1: never
    taken = [
        mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings
    ]  # a list, so that each setting is tried even if another one fails
    return all(taken)
