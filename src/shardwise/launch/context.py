"""Rank of this process in the job of another launcher, read from the environment.

No other module reads what a launcher says in the environment; `launch.engines` has one file for each launcher.

    variable                        meaning
    RANK, WORLD_SIZE                this process among all workers of the job
    LOCAL_RANK, LOCAL_WORLD_SIZE    this process among those of its host
    MASTER_ADDR, MASTER_PORT        address at which the workers meet
    TORCHELASTIC_...                set by torchrun's agent, which is then the parent process
    OMPI_..., PMIX_...              see `launch.engines.mpi`
    SLURM_...                       see `launch.engines.slurm`
    SHARDWISE_SWITCH                the network switch of this host, where the launcher does not know it

Source: https://docs.pytorch.org/docs/stable/elastic/run.html#environment-variables
"""

from __future__ import annotations

import os
from collections.abc import Mapping

from shardwise.errors import RequestError
from shardwise.launch.ranks import ENGINE, ENVIRONMENT, STORE_DESCRIPTOR, SWITCH, TORCHRUN, RankContext, number
from shardwise.units import parse_whole

LOCAL_WORKER = "SHARDWISE_LOCAL_WORKER"
"""Environment variable set in workers that Shardwise itself started: it tells them to ignore other launchers."""

OUTPUT = "SHARDWISE_OUTPUT"
"""Environment variable with the file descriptor of the command's standard output in workers that Shardwise started."""

_OTHERS = ("OMPI_", "SLURM_")
"""Beginnings of the variables of launchers that have a file in `launch.engines`."""

_settled: RankContext | None = None
"""The rank of this process once its workers have met, if it is another than the launcher's."""

_RANK = "RANK"
_IDENTITY, _MEETING = (_RANK, "WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")


def rank_context(environment: Mapping[str, str] | None = None) -> RankContext | None:
    """Return the rank of this process in another launcher's job. Returns None if no other launcher started it.

    RANK and WORLD_SIZE come first: who sets them by hand means them. RANK or WORLD_SIZE alone are ignored: some shells
    and containers leave them behind. A job of one worker needs nobody to meet: it is no job of another launcher.

    Raises:
        RequestError: the variables contradict each other, or only a part of them is set.
    """
    if environment is None and _settled is not None:
        return _settled
    env = os.environ if environment is None else environment
    if LOCAL_WORKER in env:
        return None
    named = _named_rank(env)
    if named is not None or not any(name.startswith(_OTHERS) for name in env):
        return named
    from shardwise.launch.engines.mpi import mpi_rank  # every start would take longer
    from shardwise.launch.engines.slurm import slurm_rank

    return mpi_rank(env) or slurm_rank(env)


def settle_rank(context: RankContext) -> None:
    """Make `context` what `rank_context()` returns in this process, whatever the environment says.

    RANK, if it is set, follows: the workload's own code may read it.
    """
    global _settled
    _settled = context
    if _RANK in os.environ:
        os.environ[_RANK] = str(context.rank)


def _named_rank(env: Mapping[str, str]) -> RankContext | None:
    """Return the rank that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT name. Returns None if they name none."""
    if not all(name in env for name in _IDENTITY):
        return None
    missing = [name for name in _MEETING if name not in env]
    if missing:
        if env["WORLD_SIZE"] == "1":
            return None
        raise RequestError(
            f"RANK={env['RANK']} and WORLD_SIZE={env['WORLD_SIZE']} are set, {' and '.join(missing)} not: set "
            "them too, or unset RANK and WORLD_SIZE to start local workers"
        )
    elastic = "TORCHELASTIC_RUN_ID" in env
    rank = number(env, "RANK")
    return RankContext(
        rank=rank,
        workers=number(env, "WORLD_SIZE"),
        local_rank=number(env, "LOCAL_RANK", 0),
        local_workers=number(env, "LOCAL_WORLD_SIZE") if "LOCAL_WORLD_SIZE" in env else None,
        address=env["MASTER_ADDR"],
        port=number(env, "MASTER_PORT"),
        elastic=elastic,
        restarts=number(env, "TORCHELASTIC_RESTART_COUNT", 0),
        engine=TORCHRUN if elastic else env.get(ENGINE, ENVIRONMENT),
        keeps_store=rank == 0 and not elastic,
        store_descriptor=number(env, STORE_DESCRIPTOR) if STORE_DESCRIPTOR in env else None,
        switch=env.get(SWITCH, ""),
    )


def environment() -> Mapping[str, str]:
    """Return this process's environment, for what a launcher says in it about a job that is yet to start."""
    return os.environ


def under_launcher() -> bool:
    """Return whether another launcher started this process as one of its workers; it then starts none itself."""
    return rank_context() is not None


def is_first() -> bool:
    """Return whether this process prints for its job: it is rank 0 of another launcher, or has no other launcher."""
    context = rank_context()
    return context is None or context.rank == 0


def write_to_output() -> None:
    """Let this worker write to the command's standard output, which is the parent's alone otherwise."""
    os.dup2(int(os.environ[OUTPUT]), 1)


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
