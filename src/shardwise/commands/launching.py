"""Running of a command under an engine: the same command line on each worker, less the options that name the engine."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.cluster.cluster import Cluster
from shardwise.commands.report import report_in
from shardwise.commands.request import AnyWorkload, settle_strategy
from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch.context import environment
from shardwise.launch.engines.choice import launcher_of
from shardwise.launch.launcher import LaunchRequest, launch
from shardwise.run.training.run_folder import new_folder, read_summary

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


def train_under(
    engine: str,
    workload: AnyWorkload,
    *,
    out: str | Path | None,
    hosts: str | None,
    resume: bool | str,
    settings: Mapping[str, Any],
    proof: bool,
    **options: Any,
) -> dict[str, Any]:
    """Train a workload under an engine and return the run's summary, which its folder has.

    Args:
        engine: name of the engine.
        workload: a name, or a function of a file, which workers load by its name.
        out: the run's folder, which this host and that of rank 0 share; None: a new one in runs/.
        hosts: hosts to run on, with commas between them.
        resume: as in `api.train`; needs `out`.
        settings: parameters of the workload's function.
        proof: as in `api.train`.
        options: further options of `shardwise train`, by name.

    Raises:
        RequestError: the request is wrong; found before anything starts, or by the workers.
        ShardwiseError: a worker failed; its error is on standard error.
        Terminated: a signal told the job to end.
    """
    if resume and out is None:
        raise RequestError(f"resume={resume} with engine {engine}: give out too, the folder of the run")
    name = _name_of(workload, engine)
    words = [word for key, value in options.items() for word in _option(key, value)]
    words += [word for key, value in settings.items() for word in ("--set", f"{key}={_plain(key, value)}")]
    words += ["--no-proof"] * (not proof) + ["--resume"] * bool(resume) + ["auto"] * (resume == "auto")
    folder = new_folder(f"{name.rpartition(':')[2]}-{engine}") if out is None else Path(out)
    strategy, workers = options.get("strategy"), options.get("workers")
    try:
        status = run_under(
            engine,
            ("train", name, "--out", str(folder), *words),
            strategy=None if strategy is None else str(strategy),
            workers=workers,
            hosts=hosts,
            grace=options.get("grace", 0.0),
        )
    finally:
        if out is None:
            with contextlib.suppress(OSError):
                folder.rmdir()  # it stays empty if nothing started
    if status:
        kind = RequestError if status == 2 else ShardwiseError
        raise kind(f"engine {engine}: the job ended with exit status {status}; its error is on standard error")
    return {**read_summary(folder), **report_in(folder)}


def _name_of(workload: AnyWorkload, engine: str) -> str:
    """Return the name by which a worker loads a workload. Raises RequestError if it has none."""
    if isinstance(workload, str):
        return workload
    name = getattr(workload, "__qualname__", ".")
    module = inspect.getmodule(workload)
    source = getattr(module, "__file__", None)
    if not inspect.isfunction(workload) or not name.isidentifier() or source is None or module is None:
        raise RequestError(
            f"engine {engine}: its workers load the workload themselves: give its name, file.py:function, or a "
            "function of a file, not an object or a function within another"
        )
    return f"{module.__name__}:{name}" if module.__package__ else f"{Path(source).resolve()}:{name}"


def _option(name: str, value: Any) -> list[str]:
    """Return the words of an option on a command line; none for None, False and empty ones."""
    flag = f"--{name.replace('_', '-')}"
    if value is None or value is False or value == ():
        return []
    if value is True:
        return [flag]
    if name == "track" and not isinstance(value, str):
        value = ",".join(value)
    many = value if isinstance(value, list | tuple) else [value]
    return [word for each in many for word in (flag, str(each))]


def _plain(name: str, value: Any) -> str:
    """Return a value of `--set`. Raises RequestError if it is no number and no text."""
    if not isinstance(value, bool | int | float | str):
        raise RequestError(f"settings: {name}={value!r}: workers of an engine get numbers and text alone")
    return str(value)


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
