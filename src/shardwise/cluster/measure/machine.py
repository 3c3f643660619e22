"""Properties of this machine: its processor, cores, memory, and software versions."""

from __future__ import annotations

import os
import platform
from importlib.metadata import version
from pathlib import Path


def processor() -> str:
    """Return the model name that the processor reports."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text(errors="replace").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_bytes() -> int:
    """Return the bytes of memory of the machine, or of its container if that has a lower limit."""
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    allowed = limit.read_text().strip() if limit.exists() else "max"
    return min(total, int(allowed)) if allowed.isdigit() else total


def software() -> dict[str, str]:
    """Return the versions of torch, Python and the operating system, on which measured times depend."""
    return {"torch": version("torch"), "python": platform.python_version(), "system": platform.platform()}
