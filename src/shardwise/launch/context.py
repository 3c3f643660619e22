"""Rank of this process in the job of another launcher such as torchrun, read from the environment.

No other module reads these variables:

    variable                        meaning
    RANK, WORLD_SIZE                this process among all workers of the job
    LOCAL_RANK, LOCAL_WORLD_SIZE    this process among those of its host
    MASTER_ADDR, MASTER_PORT        address at which the workers meet
    TORCHELASTIC_...                set by torchrun's agent, which is then the parent process

Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass

from shardwise.errors import RequestError
from shardwise.units import parse_whole

LOCAL_WORKER = "SHARDWISE_LOCAL_WORKER"
"""Environment variable set in workers that Shardwise itself started: it tells them to ignore other launchers."""

_IDENTITY, _MEETING = ("RANK", "WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class RankContext:
    """Rank of this process, and the other facts about its job that another launcher put into the environment.

    Attributes:
        rank: rank among all workers.
        workers: number of all workers.
        local_rank: rank among the workers of this host.
        local_workers: number of workers on this host; None if the launcher does not say.
        address: host at which the workers meet.
        port: TCP port at which the workers meet.
        elastic: True if torchrun started this process: its agent is the parent and keeps the store at `address`.
        restarts: number of times that torchrun has restarted the workers.
    """

    rank: int
    workers: int
    local_rank: int
    local_workers: int | None
    address: str
    port: int
    elastic: bool
    restarts: int

    @property
    def one_host(self) -> bool:
        """Return whether all workers of the job are known to be on this host."""
        return self.local_workers == self.workers


def rank_context(environment: Mapping[str, str] | None = None) -> RankContext | None:
    """Return the rank of this process in another launcher's job. Returns None if no other launcher started it.

    RANK or WORLD_SIZE alone are ignored: some shells and containers leave them behind.

    Raises:
        RequestError: the variables contradict each other, or only a part of them is set.
    """
    env = os.environ if environment is None else environment
    if LOCAL_WORKER in env or not all(name in env for name in _IDENTITY):
        return None
    missing = [name for name in _MEETING if name not in env]
    if missing:
        if env["WORLD_SIZE"] == "1":
            return None
        raise RequestError(
            f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, {' and '.join(missing)} not: set "
            "them too, or unset RANK and WORLD_SIZE to start local workers"
        )
    rank, workers = _number(env, "RANK"), _number(env, "WORLD_SIZE")
    if rank >= workers:
        raise RequestError(f"RANK={rank} is not below WORLD_SIZE={workers}: start ranks 0 to {max(0, workers - 1)}")
    return RankContext(
        rank=rank,
        workers=workers,
        local_rank=_number(env, "LOCAL_RANK", 0),
        local_workers=_number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None,
        address=env["MASTER_ADDR"],
        port=_number(env, "MASTER_PORT"),
        elastic="TORCHELASTIC_RUN_ID" in env,
        restarts=_number(env, "TORCHELASTIC_RESTART_COUNT", 0),
    )


def under_launcher() -> bool:
    """Return whether another launcher started this process as one of its workers; it then starts none itself."""
    return rank_context() is not None


def is_first() -> bool:
    """Return whether this process prints for its job: it is rank 0 of another launcher, or has no other launcher."""
    context = rank_context()
    return context is None or context.rank == 0


def given_threads() -> int | None:
    """Return the number of intra-op threads that OMP_NUM_THREADS sets for each worker. Returns None if it is not set.

    Raises:
        RequestError: OMP_NUM_THREADS is not a whole number of 1 or more.
    """
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return None
    try:
        threads = parse_whole(text.partition(",")[0].strip())  # OpenMP accepts one number per level of nesting
    except ValueError:
        threads = 0
    if threads < 1:
        raise RequestError(f"OMP_NUM_THREADS={text} in the environment: must be a whole number of 1 or more")
    return threads


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    try:
        number = parse_whole(text or "")
    except ValueError:
        number = -1
    if number < 0:
        raise RequestError(f"{name}={text} in the environment is no whole number: unset it, or start with a launcher")
    return number
