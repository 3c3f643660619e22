"""Dry runs that the tests of one file share: running a worker dry takes longer than all that is compared with it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from traces import remembered

from shardwise.predict import crosscheck
from shardwise.predict.dry_run.dry_run import DryRun, dry_run
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

_RUNS: dict[Any, DryRun] = {}


@contextmanager
def shared(name: str) -> Iterator[None]:
    """While it is open, `crosscheck` runs each worker of a strategy of the workload `name` dry once.

    A dry run knows no cluster and no price, so that it is the same whatever a test changes of these.
    """

    def run(workload: Workload, strategy: Strategy, rank: int = 0, *, cuts: Any = None, device: str = "cpu") -> DryRun:
        key = (name, workload.batch_size, strategy, rank, cuts, device)
        if key not in _RUNS:
            _RUNS[key] = dry_run(workload, strategy, rank, cuts=cuts, device=device)
        return _RUNS[key]

    with remembered(name), mock.patch.object(crosscheck, "dry_run", run):
        yield
