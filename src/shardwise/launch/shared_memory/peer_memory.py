"""Reads of another process's memory: process_vm_readv(2), which copies once where shared memory needs two copies.

Linux allows it to whom it allows to debug the process: not everywhere, so that a group tries it when it is made.
"""

from __future__ import annotations

import ctypes
import os

from torch import Tensor


class _Span(ctypes.Structure):
    _fields_ = (("address", ctypes.c_void_p), ("size", ctypes.c_size_t))


_library = ctypes.CDLL(None, use_errno=True)
_read = getattr(_library, "process_vm_readv", None)
if _read is not None:
    _read.restype = ctypes.c_ssize_t
    _read.argtypes = (
        ctypes.c_int,
        ctypes.POINTER(_Span),
        ctypes.c_ulong,
        ctypes.POINTER(_Span),
        ctypes.c_ulong,
        ctypes.c_ulong,
    )


def read_memory(process: int, address: int, target: Tensor) -> None:
    """Copy bytes at an address of another process to a contiguous tensor, as many as it has.

    Raises:
        OSError: the process has ended, this one may not read its memory, or it has none there.
    """
    if _read is None:
        raise OSError("this system has no process_vm_readv")
    done, size = 0, target.nbytes
    while done < size:
        here, there = _Span(target.data_ptr() + done, size - done), _Span(address + done, size - done)
        got = _read(process, ctypes.byref(here), 1, ctypes.byref(there), 1, 0)
        if got <= 0:
            number = ctypes.get_errno()
            raise OSError(number, f"memory of process {process} cannot be read: {os.strerror(number)}")
        done += got
