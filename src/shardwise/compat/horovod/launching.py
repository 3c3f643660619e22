"""Start of a function or a script on local workers of Shardwise's own launcher, as `horovodrun` does."""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shardwise.compat.horovod.functions import allgather_object
from shardwise.compat.horovod.world import init, shutdown
from shardwise.errors import RequestError, ShardwiseError
from shardwise.launch.context import write_to_output
from shardwise.launch.local import run_local


def run(
    func: Callable[..., Any], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None, np: int = 1
) -> list[Any]:
    """Call a function on `np` local workers, and return its results by rank; they must be plain values.

    Raises:
        RequestError: `np` is below 1, or the function or a result cannot be sent.
        WorkerFailed: a worker died.
    """
    _check_count(np)
    results: list[Any] = run_local(_called, (func, tuple(args), dict(kwargs or {})), workers=np)
    return results


def _called(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[Any]:
    result = func(*args, **kwargs)
    init()
    results = allgather_object(result, "run.results")
    shutdown()
    return results


def run_script(script: str, arguments: Sequence[str], workers: int) -> None:
    """Run a script with its arguments as the main module of each of `workers` local workers.

    Raises:
        RequestError: there is no such script, or `workers` is below 1.
        WorkerFailed: a worker died.
        ShardwiseError: the script ended with an exit status other than 0.
    """
    _check_count(workers)
    path = Path(script)
    if not path.is_file():
        raise RequestError(f"there is no script {script!r}: give the path of a Python file")
    run_local(_main, (str(path.resolve()), list(arguments)), workers=workers)


def _main(path: str, arguments: list[str]) -> None:
    write_to_output()
    sys.argv = [path, *arguments]
    sys.path.insert(0, str(Path(path).parent))
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as error:
        if error.code:
            raise ShardwiseError(f"{Path(path).name} ended with exit status {error.code}") from None
    finally:
        sys.stdout.flush()  # a worker ends without it


def _check_count(workers: int) -> None:
    if workers < 1:
        raise RequestError(f"np={workers}: must be 1 or more")
