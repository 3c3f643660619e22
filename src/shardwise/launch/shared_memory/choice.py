"""Choice of how workers on CPUs reach each other: through shared memory if they are on one host, else by gloo."""

from __future__ import annotations

import os
import sys

from shardwise.errors import RequestError

SETTING = "SHARDWISE_TRANSPORT"
"""Environment variable that chooses one of TRANSPORTS for workers of one host."""

SHM, GLOO = TRANSPORTS = ("shm", "gloo")

LAYERED = "shm+gloo"
"""Transport of a group over several hosts: shared memory within each of them, gloo between them."""

NCCL = "nccl"
"""Transport between workers on GPUs, which none of TRANSPORTS changes."""

EVENTS = f"{SHM}:"
"""Prefix of the names that the profiler gives to what is sent through shared memory; that of gloo is `gloo:`."""


def transport() -> str:
    """Return how workers of one host that compute on CPUs reach each other here.

    It is gloo where the system has no anonymous shared files (Linux has), and where TORCH_DISTRIBUTED_DEBUG=DETAIL asks
    torch to check each collective, which it does for its own backends only.

    Raises:
        RequestError: the environment variable SETTING is none of TRANSPORTS.
    """
    chosen = os.environ.get(SETTING, SHM)
    if chosen not in TRANSPORTS:
        raise RequestError(f"{SETTING}={chosen}: must be {' or '.join(TRANSPORTS)}")
    possible = sys.platform == "linux" and hasattr(os, "memfd_create") and sys.maxsize > 2**32
    checked = os.environ.get("TORCH_DISTRIBUTED_DEBUG") == "DETAIL"
    return chosen if possible and not checked else GLOO
