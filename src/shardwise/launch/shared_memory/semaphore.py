"""Semaphores in memory that processes share: those of POSIX, called in the C library.

Posting never blocks, and waiting enters the kernel only if the count is zero (sem_overview(7)). Posting is a release
and waiting an acquire: what a process wrote to shared memory before it posted is seen by the process that waited.
"""

from __future__ import annotations

import ctypes
import time

BYTES = 64
"""Bytes of memory set aside for a semaphore: a cache line. `sem_t` of glibc and musl has 32."""


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


# a call through PyDLL holds the interpreter's lock, which is cheaper; one through CDLL lets other threads run
_quick, _blocking = ctypes.PyDLL(None), ctypes.CDLL(None)
_init, _post, _try = _quick.sem_init, _quick.sem_post, _quick.sem_trywait
_init.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.c_uint)
_post.argtypes = _try.argtypes = (ctypes.c_void_p,)


def _timed_wait() -> tuple[ctypes._NamedFuncPointer, int]:
    """Return the C library's wait with a deadline, and the clock of its deadline.

    A clock that is set back would prolong a wait; only glibc 2.30 and later has a wait by the steady clock.
    """
    if hasattr(_blocking, "sem_clockwait"):
        wait = _blocking.sem_clockwait
        wait.argtypes = (ctypes.c_void_p, ctypes.c_int, ctypes.POINTER(_Timespec))
        return wait, time.CLOCK_MONOTONIC
    wait = _blocking.sem_timedwait
    wait.argtypes = (ctypes.c_void_p, ctypes.POINTER(_Timespec))
    return wait, time.CLOCK_REALTIME


_wait, _clock = _timed_wait()
_clocks = (_clock,) if _clock == time.CLOCK_MONOTONIC else ()


class Semaphore:
    """Counter at an address of shared memory, which the process that owns the memory has initialized."""

    __slots__ = ("_address",)

    def __init__(self, address: int) -> None:
        self._address = address

    def initialize(self, count: int) -> None:
        """Set the count, before any other process knows the memory."""
        if _init(self._address, 1, count):
            raise OSError("sem_init failed")

    def post(self) -> None:
        """Add one to the count, and wake a process that waits."""
        _post(self._address)

    def try_wait(self) -> bool:
        """Take one off the count if it is not zero. Returns whether it was not."""
        return bool(_try(self._address) == 0)

    def wait(self, seconds: float) -> bool:
        """Take one off the count, waiting for it at most `seconds`; a signal may end the wait early.

        Returns:
            True if one was taken.
        """
        whole, part = divmod(time.clock_gettime_ns(_clock) + int(seconds * 1e9), 10**9)
        return bool(_wait(self._address, *_clocks, ctypes.byref(_Timespec(whole, part))) == 0)
