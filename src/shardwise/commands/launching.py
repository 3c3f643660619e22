"""Running of a command under an engine: the same command line on each worker, less the options that name the engine."""

from __future__ import annotations

from collections.abc import Sequence

from shardwise.cluster.cluster import Cluster
from shardwise.commands.request import settle_strategy
from shardwise.errors import RequestError
from shardwise.launch.context import environment
from shardwise.launch.engines.choice import launcher_of
from shardwise.launch.launcher import LaunchRequest, launch

WITH_VALUE, ALONE = ("--engine", "--hosts", "--image"), ("--dry-run",)
"""Options that name the engine, and that workers do not get."""


def run_under(
    engine: str,
    arguments: Sequence[str],
    *,
    strategy: str | None,
    workers: int | None,
    hosts: str | None = None,
    grace: float = 0.0,
    image: str | None = None,
    dry_run: bool = False,
) -> int | str:
    """Run a command under an engine and return its exit status; with `dry_run`, return the engine's script instead.

    Args:
        engine: name of the engine.
        arguments: command line of `shardwise`.
        strategy: strategy of the training; None or `auto`: chosen by the workers.
        workers: number of workers; None: what the strategy needs, or what the allocation has.
        hosts: hosts to run on, with commas between them.
        grace: seconds that the run has to write a checkpoint when it is told to end.
        image: container image of the workers.
        dry_run: start nothing.

    Raises:
        RequestError: the request is wrong; found before anything starts.
        Terminated: a signal told the job to end.
    """
    launcher = launcher_of(engine)
    around = environment()
    allocated = launcher.allocated(around)
    if strategy in (None, "auto"):
        needed = workers if workers is not None or allocated is None else allocated.workers
        if needed is None:
            raise RequestError(
                f"engine {engine}: how many workers to start? give --workers, or a --strategy that says it"
            )
    else:
        needed = settle_strategy(strategy, workers).workers
    if needed < 1:
        raise RequestError(f"workers={needed}: must be 1 or more")
    asked = LaunchRequest(
        arguments=passed_on(arguments),
        workers=needed,
        hosts=_hosts(hosts),
        grace=grace,
        image=image or "",
        environment=around,
    )
    return launcher.script(asked) if dry_run else launch(launcher, asked)


def allocated_workers(engine: str, workers: int | str | None, cluster: Cluster) -> int:
    """Return the workers of the allocation of `engine` that this command is in, to plan for them on `cluster`.

    Raises:
        RequestError: there is no allocation, `workers` is another number, or the workers of the allocation's nodes are
            not those of the cluster's nodes, so that ranks would not share the nodes that a plan means.
    """
    allocation = launcher_of(engine).allocated(environment())
    if allocation is None:
        raise RequestError(f"engine {engine}: this command is in no allocation: leave out --engine, or allocate first")
    count = allocation.workers
    if workers is not None and str(workers) != str(count):
        raise RequestError(f"workers={workers}: the allocation of {engine} was made for {count} tasks: leave one out")
    has = [nodes.devices for nodes in cluster.nodes for _ in range(nodes.count)][: len(allocation.nodes)]
    *full, last = allocation.nodes or (0,)
    if not last or len(has) <= len(full) or full != has[:-1] or last > has[-1]:
        raise RequestError(
            f"engine {engine}: the allocation has {_numbers(allocation.nodes)} tasks on its nodes, {cluster.name} has "
            f"{_numbers(has)} devices on as many: give the cluster file of these nodes (shardwise calibrate --engine "
            f"{engine}), or allocate with --ntasks-per-node"
        )
    return count


def _numbers(nodes: Sequence[int]) -> str:
    return " + ".join(map(str, nodes)) or "no known number of"


def passed_on(arguments: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments that workers get: all but the options that name the engine."""
    left: list[str] = []
    skip = False
    for word in arguments:
        if skip or word in ALONE or word in WITH_VALUE:
            skip = not skip and word in WITH_VALUE
        elif not word.startswith(tuple(f"{option}=" for option in WITH_VALUE)):
            left.append(word)
    return tuple(left)


def _hosts(text: str | None) -> tuple[str, ...]:
    """Return the hosts of `a,b`. Raises RequestError if one has no name, or would be read as an option."""
    if text is None:
        return ()
    hosts = tuple(host.strip() for host in text.split(","))
    wrong = [host for host in hosts if not host or host.startswith("-") or not host.isprintable() or " " in host]
    if wrong:
        raise RequestError(f"--hosts {text}: {wrong[0]!r} is no host: write their names with commas, --hosts a,b")
    return hosts
