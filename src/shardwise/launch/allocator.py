"""What the C library does with memory that is freed: by default large tensors go back to the system each time.

A training step frees all of its activations, and the next one takes as much again: the system has to clear every page
of it anew. On a CPU that is up to a third of a step (docs/how-it-works.md). So workers keep what they have had once.

torch asks for aligned memory. glibc cuts it from a larger piece and puts the rest into caches of small pieces, where it
does not join again with what was cut when that is freed: the hole is then a little too small for a tensor of the same
size, and the process grows to several times what its tensors need. Without those caches holes become whole again. That
of each thread can be left out only when a process starts.
"""

from __future__ import annotations

import ctypes
import os
import platform

# malloc.h of glibc; see mallopt(3)
M_MXFAST, M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD = 1, -1, -2, -3

LARGEST = 2**30
"""Bytes of a tensor that is given back to the system all the same: it would hardly fit into what another one left."""

PAD = 2**26
"""Bytes that are asked for at least."""


TUNABLES = "GLIBC_TUNABLES"
WITHOUT_CACHES = "glibc.malloc.tcache_count=0"
"""For a process that is to start: no caches of small pieces for each thread."""


def starting() -> dict[str, str]:
    """What is to be in the environment of a worker when it starts; nothing where `keep_memory` does nothing."""
    return {TUNABLES: WITHOUT_CACHES} if _is_ours() else {}


def _is_ours() -> bool:
    """Whether it is glibc's allocator, and no person has settled how it works."""
    chosen = any(name.startswith("MALLOC_") or name == "LD_PRELOAD" for name in os.environ)
    tuned = os.environ.get(TUNABLES, WITHOUT_CACHES) != WITHOUT_CACHES
    return not chosen and not tuned and platform.libc_ver()[0] == "glibc"


def keep_memory() -> bool:
    """Lets this process keep memory that it frees, for what it allocates next.

    Returns:
        whether it does: on Linux with glibc, unless its user chose otherwise (`MALLOC_...` in the environment, another
        allocator by `LD_PRELOAD`).
    """
    if not _is_ours():
        return False
    mallopt = ctypes.CDLL(None).mallopt
    settings = ((M_MMAP_THRESHOLD, LARGEST), (M_TRIM_THRESHOLD, -1), (M_TOP_PAD, PAD), (M_MXFAST, 0))  # -1: never
    taken = [
        mallopt(ctypes.c_int(name), ctypes.c_int(value)) for name, value in settings
    ]  # each, whatever the others do
    return all(taken)
