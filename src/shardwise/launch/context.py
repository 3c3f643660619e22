"""Read which rank of which job this process is, where another launcher (torchrun, say) started it.

The only reader of these variables:

    variable                        meaning
    RANK, WORLD_SIZE                this process among all workers of the job
    LOCAL_RANK, LOCAL_WORLD_SIZE    this process among those of its host
    MASTER_ADDR, MASTER_PORT        where the workers meet
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
"""Set in the environment of workers that Shardwise itself started: for them there is no other launcher."""

_IDENTITY, _MEETING = ("RANK", "WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True, slots=True)
class RankContext:
    """The place of this process in the job of another launcher.

    Attributes:
        rank: its number among all workers.
        workers: how many there are.
        local_rank: its number among the workers of this host.
        local_workers: how many there are on this host; None where the launcher does not say.
        address: host at which the workers meet.
        port: its TCP port.
        elastic: torchrun started it: its agent is the parent and keeps the store at `address`.
        restarts: how often torchrun has started the workers anew.
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
        """Tell whether all workers of the job are known to be on this host."""
        return self.local_workers == self.workers


def rank_context(environment: Mapping[str, str] | None = None) -> RankContext | None:
    """Return the place of this process in another launcher's job; None where it was started by itself.

    RANK or WORLD_SIZE alone, as some shells and containers leave them behind, mean nothing.

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
    """Tell whether another launcher started this process as one of its workers, so that none are started here."""
    return rank_context() is not None


def is_first() -> bool:
    """Tell whether this process speaks for its job: rank 0 of another launcher, or a process started by itself."""
    context = rank_context()
    return context is None or context.rank == 0


def given_threads() -> int | None:
    """Return the intra-op threads that the environment sets for each worker; None where it sets none.

    Raises:
        RequestError: OMP_NUM_THREADS is no number.
    """
    text = os.environ.get("OMP_NUM_THREADS")
    if text is None:
        return None
    try:
        threads = parse_whole(text.partition(",")[0].strip())  # OpenMP takes a number for each level of nesting
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
