"""Meeting of the workers of another launcher at a TCP store, which one of them opens unless the launcher keeps one.

A launcher that names no port (Slurm, Open MPI) names its job. A few ports follow from that name, the same on every
worker. The one that opens the store takes the first of them that is free, and puts the name into the store; the others
try all of them until they find a store with that name. So two jobs on one host do not take each other's port.
"""

from __future__ import annotations

import hashlib
import itertools
import os
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shardwise.errors import RequestError
from shardwise.launch.engines.slurm import node_address
from shardwise.launch.ranks import ENVIRONMENT, LOOPBACK, TORCHRUN, RankContext

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

MEET_SECONDS = 120.0
"""Seconds that the workers of another launcher wait for each other before they give up."""

MEET_SETTING = "SHARDWISE_MEET_SECONDS"
"""Environment variable that overrides MEET_SECONDS."""

PORTS = range(20_000, 32_000)
"""TCP ports at which workers may meet by a key: below those that systems hand out by themselves."""

TRIES = 16
"""Number of ports that follow from a key."""

ANSWER_SECONDS = 3.0
"""Seconds that whoever listens at one of the ports may take to answer before it counts as somebody else's."""

JOB = "shardwise-job"
"""Name in a store under which the key of its job stands."""


@dataclass(frozen=True, slots=True)
class Meeting:
    """Meeting point of this process and the other workers.

    Attributes:
        store: store of the job, without what an earlier attempt left in it.
        address: host of the store.
        port: TCP port of the store.
    """

    store: Any
    address: str
    port: int


_met: Meeting | None = None


def meet(context: RankContext, seconds: float | None = None) -> Meeting:
    """Connect to the job's store, or open it, and return it; a second call returns the first one's.

    Args:
        context: rank of this process.
        seconds: time to wait for the others; None: `meet_seconds()`.

    Raises:
        RequestError: nobody answers in time.
    """
    global _met
    if _met is None:
        limit = meet_seconds() if seconds is None else seconds
        try:
            _met = _by_key(context, limit) if context.key else _by_port(context, limit)
        except (OSError, RuntimeError, ValueError) as error:  # DistNetworkError, DistStoreError: nobody answers
            raise RequestError(_nobody(context, limit, error)) from error
    return _met


def meet_seconds() -> float:
    """Return the seconds that workers wait for each other. Raises RequestError if the setting is not a valid number."""
    text = os.environ.get(MEET_SETTING, str(MEET_SECONDS))
    try:
        seconds = float(text)
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < 1e6:
        raise RequestError(f"{MEET_SETTING}={text}: must be a number of seconds above 0")
    return seconds


def _nobody(context: RankContext, seconds: float, error: Exception) -> str:
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    if context.key:
        return (
            f"rank {context.rank} of {context.workers} ({context.engine}): the other workers did not meet at "
            f"{context.address} within {seconds:g} s ({reason}): ports {PORTS.start} to {PORTS.stop - 1} of that host "
            "must be open to the job's other hosts; or set MASTER_ADDR and MASTER_PORT for all workers"
        )
    return (
        f"rank {context.rank} of {context.workers} (RANK, WORLD_SIZE): the other workers did not meet at "
        f"{context.address}:{context.port} within {seconds:g} s ({reason}): start all of them, or "
        "unset RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT to start local workers"
    )


# ---- at a port that the launcher names ----


def _by_port(context: RankContext, seconds: float) -> Meeting:
    from torch.distributed import PrefixStore, TCPStore, rendezvous  # type: ignore[attr-defined]

    limit = timedelta(seconds=seconds)
    if not context.keeps_store:
        _await_port(context, time.monotonic() + seconds)
    if context.engine in (ENVIRONMENT, TORCHRUN):
        store, _, _ = next(rendezvous("env://", timeout=limit))
    else:
        store = TCPStore(
            context.address,
            context.port,
            is_master=context.keeps_store,
            timeout=limit,
            wait_for_workers=False,
            master_listen_fd=context.store_descriptor,
        )
    # torchrun keeps its store over restarts, and keys of an earlier attempt must not be read again
    return Meeting(PrefixStore(f"shardwise/{context.restarts}", store), context.address, context.port)


def _await_port(context: RankContext, end: float) -> None:
    """Wait until the meeting point accepts connections, without the log lines of torch's own attempts.

    Raises:
        OSError: it does not until the monotonic time `end`.
    """
    while True:
        left = end - time.monotonic()
        try:
            socket.create_connection((context.address, context.port), timeout=max(left, 0.1)).close()
        except OSError:
            if left <= 0:
                raise
            time.sleep(0.1)
        else:
            return


# ---- at one of the ports that follow from the job's key ----


def ports_of(key: str) -> list[int]:
    """Return the ports at which a job's workers may meet, in the order in which they are tried."""
    digest = hashlib.shake_256(key.encode()).digest(4 * TRIES)
    numbers = (int.from_bytes(digest[i : i + 4], "big") for i in range(0, len(digest), 4))
    return [PORTS[value % len(PORTS)] for value in numbers]


def _by_key(context: RankContext, seconds: float) -> Meeting:
    from torch.distributed import PrefixStore  # type: ignore[attr-defined]

    if context.keeps_store:
        address, store = LOOPBACK, _open(context.key, LOOPBACK if context.one_host else "", seconds)
    else:
        address, store = _find(context.key, [node_address(each) for each in context.address.split(",")], seconds)
    return Meeting(PrefixStore("shardwise", store), address, store.port)


def _open(key: str, device: str, seconds: float) -> TCPStore:
    """Open the job's store at the first free port of its key, on one address of this host or, with "", on all.

    Raises:
        OSError: all of the ports are in use.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    for port in ports_of(key):
        listener = socket.socket()
        try:
            listener.bind((device, port))
            listener.listen(1024)
        except OSError:
            listener.close()
            continue
        store = TCPStore(
            LOOPBACK,
            port,
            is_master=True,
            timeout=timedelta(seconds=seconds),
            wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )
        store.set(JOB, key)
        return store
    raise OSError(f"ports {', '.join(map(str, ports_of(key)))} of this host are all in use")


def _find(key: str, addresses: Sequence[str], seconds: float) -> tuple[str, TCPStore]:
    """Return the job's store and its address, one of `addresses`; its port is one of those of its key.

    Raises:
        OSError: it is at none of them within `seconds`.
    """
    end = time.monotonic() + seconds
    while True:
        for address, port in itertools.product(addresses, ports_of(key)):
            store = _store_at(key, address, port)
            if store is not None:
                store.set_timeout(timedelta(seconds=seconds))
                return address, store
        if time.monotonic() >= end:
            raise OSError("no store of this job answers")
        time.sleep(0.1)


def _store_at(key: str, address: str, port: int) -> TCPStore | None:
    """Return the store of the job `key` if it is the one that listens there. Returns None if it is not."""
    from torch.distributed import TCPStore  # type: ignore[attr-defined]

    try:
        socket.create_connection((address, port), timeout=ANSWER_SECONDS).close()
        store = TCPStore(address, port, is_master=False, timeout=timedelta(seconds=ANSWER_SECONDS))
        return store if store.check([JOB]) and store.get(JOB).decode() == key else None
    except (OSError, RuntimeError):
        return None
