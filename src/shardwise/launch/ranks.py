"""Rank of a process in a job of several workers, as the launcher that started it tells."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.errors import RequestError
from shardwise.units import parse_whole

LOOPBACK = "127.0.0.1"
"""Address at which the workers of one host meet: nobody outside the host can reach it."""


ENVIRONMENT, TORCHRUN = "environment", "torchrun"
"""Engines of a worker whose launcher sets RANK and WORLD_SIZE: one that has no name, and torchrun."""

SWITCH = "SHARDWISE_SWITCH"
"""Environment variable with the name of this host's switch, where the launcher itself does not know it."""

ENGINE = "SHARDWISE_ENGINE"
"""Environment variable with the engine's name, in workers that an engine starts through `launch.engines.member`."""

STORE_DESCRIPTOR = "SHARDWISE_STORE_DESCRIPTOR"
"""Environment variable with the descriptor of the open socket at which such a worker keeps the job's store."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankContext:
    """Rank of this process, and the other facts about its job that another launcher put into the environment.

    Attributes:
        rank: rank among all workers.
        workers: number of all workers.
        local_rank: rank among the workers of this host.
        local_workers: number of workers on this host; None if the launcher does not say.
        address: host at which the workers meet.
        port: TCP port at which the workers meet; 0 if they find one by `key`.
        elastic: True if torchrun started this process: its agent is the parent and keeps the store at `address`.
        restarts: number of times that the launcher has restarted the workers.
        engine: name of the launcher.
        key: text that only this job has, from which the ports to meet at follow; empty if `port` is set.
        keeps_store: True if this process opens the store at which the workers meet. It need not be rank 0.
        store_descriptor: descriptor of the open socket at which it does; None: it binds one itself.
        switch: name of the network switch that this host is at, with those above it; empty if nobody names it.
    """

    rank: int
    workers: int
    local_rank: int
    local_workers: int | None
    address: str
    port: int
    elastic: bool = False
    restarts: int = 0
    engine: str = ENVIRONMENT
    key: str = ""
    keeps_store: bool = False
    store_descriptor: int | None = None
    switch: str = ""

    def __post_init__(self) -> None:
        if self.rank >= self.workers:
            last = max(0, self.workers - 1)
            raise RequestError(f"RANK={self.rank} is not below WORLD_SIZE={self.workers}: start ranks 0 to {last}")

    @property
    def one_host(self) -> bool:
        """Return whether all workers of the job are known to be on this host."""
        return self.local_workers == self.workers


def is_passed_on(variable: str) -> bool:
    """Return whether workers on other hosts get this variable of the command's: Python's path and settings, no secrets.

    SHARDWISE_SWITCH is each host's own.
    """
    return variable in _PASSED_ON or (variable.startswith("SHARDWISE_") and variable != SWITCH)


_PASSED_ON = ("PYTHONPATH", "OMP_NUM_THREADS", "XDG_CACHE_HOME")


def number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    """Return a whole number of 0 or more from the environment.

    Raises:
        RequestError: the variable is none, or it is missing and has no default.
    """
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        value = parse_whole(text or "")
    except ValueError:
        value = -1
    if value < 0:
        raise RequestError(f"{name}={text} in the environment is no whole number: unset it, or start with a launcher")
    return value
