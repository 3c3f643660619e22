"""Notice other programs on the cores of this process: how much they compute, and which one computes most.

Linux counts the seconds for which each core was busy (proc(5), /proc/stat), those that a hypervisor gave to other
machines included (`steal`). Less what this job itself computed, they are the seconds of others. Where a system does
not count them, nothing is noticed.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path

from shardwise.cluster.measure import machine

PROC = Path("/proc")

QUIET_CORES, QUIET_SHARE = 0.15, 0.05
"""Cores, and share of all cores, that others may use while a machine counts as idle: what its services take."""

LOOK_SECONDS = 1.0
"""Seconds of a look at other programs; the system counts in hundredths of a second."""


def busy_seconds() -> float:
    """Return the seconds for which the cores of this process have been busy so far; 0 if the system counts none."""
    try:
        lines = (PROC / "stat").read_text().splitlines()
    except OSError:
        return 0.0
    own = {f"cpu{core}" for core in os.sched_getaffinity(0)} if hasattr(os, "sched_getaffinity") else None
    rows = [line.split() for line in lines if line.startswith("cpu") and line[3:4].isdigit()]
    ticks = sum(_busy([int(word) for word in row[1:]]) for row in rows if own is None or row[0] in own)
    return ticks / _ticks_per_second()


def _busy(times: list[int]) -> int:
    """Return the ticks for which a core ran programs or was taken by the hypervisor, from its line of /proc/stat.

    Interrupts do not count: those of this job's own messages belong to no process, and would seem to be of others.
    """
    user, nice, system, *_, steal = times[:8]
    return user + nice + system + steal


def cores_of_others(seconds: float = LOOK_SECONDS) -> float:
    """Return the number of cores that programs other than this process use, on average over the next `seconds`."""
    begin, busy, own = time.perf_counter(), busy_seconds(), time.process_time()
    time.sleep(seconds)
    used = busy_seconds() - busy - (time.process_time() - own)
    return max(0.0, used / (time.perf_counter() - begin))


def is_busy(used: float) -> bool:
    """Return whether others disturb measurements if they use this number of cores."""
    return used > max(QUIET_CORES, QUIET_SHARE * machine.cores())


def await_quiet(seconds: float, *, quiet: bool = False) -> float:
    """Wait until other programs leave the cores idle, and return the cores that they used in the last look.

    Args:
        seconds: longest time to wait; a first look of LOOK_SECONDS is always taken.
        quiet: do not print that and for whom it waits.
    """
    end = time.perf_counter() + seconds
    used = cores_of_others()
    if is_busy(used) and seconds > 0 and not quiet:
        sys.stderr.write(f"waiting up to {seconds:.0f} s for an idle machine: {described(used, busiest())}\n")
    while is_busy(used) and time.perf_counter() < end:
        used = cores_of_others()
    return used


def described(used: float, most: str, verb: str = "use") -> str:
    """Describe how busy others keep the cores: `other programs use 1.6 of 2 cores, python (process 41) most`."""
    by = f", {most} most" if most else ""
    return f"other programs {verb} {used:.1f} of {machine.cores()} core{'s' * (machine.cores() > 1)}{by}"


def busiest(seconds: float = LOOK_SECONDS / 2) -> str:
    """Name the other process that computes most in the next `seconds`; empty if none that can be seen computes."""
    before = _used_by_process()
    time.sleep(seconds)
    spent = {process: used - before.get(process, 0) for process, used in _used_by_process().items()}
    spent.pop(os.getpid(), None)
    most = max(spent, key=lambda process: spent[process], default=0)
    if not most or spent[most] < QUIET_CORES * seconds * _ticks_per_second():
        return ""
    with contextlib.suppress(OSError):
        return f"{(PROC / str(most) / 'comm').read_text().strip()} (process {most})"
    return ""


def _used_by_process() -> Mapping[int, int]:
    """Map each process that can be seen to the ticks that it has computed so far."""
    found: dict[int, int] = {}
    for folder in PROC.glob("[0-9]*"):
        with contextlib.suppress(OSError, ValueError, IndexError):  # it has just ended
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            found[int(folder.name)] = int(fields[11]) + int(fields[12])  # utime and stime
    return found


def _ticks_per_second() -> int:
    return os.sysconf("SC_CLK_TCK")
