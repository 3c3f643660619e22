"""What the C library does with memory that is freed: by default large tensors go back to the system each time.

A training step frees all of its activations, and the next one takes as much again: the system has to clear every page
of it anew. On a CPU that is up to a third of a step (docs/how-it-works.md). So workers keep what they have had once.
"""

from __future__ import annotations

import ctypes
import os
import platform

# malloc.h of glibc; see mallopt(3)
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = -1, -2, -3

LARGEST = 2**30
"""Bytes of a tensor that is given back to the system all the same: it would hardly fit into what another one left."""

PAD = 2**26
"""Bytes that are asked for at least."""


def keep_memory() -> bool:
    """Lets this process keep memory that it frees, for what it allocates next.

    Returns:
        whether it does: on Linux with glibc, unless its user chose otherwise (`MALLOC_...` in the environment, another
        allocator by `LD_PRELOAD`).
    """
    chosen = any(name.startswith("MALLOC_") or name in ("LD_PRELOAD", "GLIBC_TUNABLES") for name in os.environ)
    if chosen or platform.libc_ver()[0] != "glibc":
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, PAD))  # -1: never
    taken = [
        mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings
    ]  # each, whatever the others do
    return all(taken)
