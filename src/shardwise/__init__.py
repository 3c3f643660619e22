"""Shardwise plans a parallel strategy, predicts its cost, verifies that it computes the same, and trains with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.version import __version__ as __version__

if TYPE_CHECKING:
    from shardwise.api import (
        TrainedModel,
        calibrate,
        compare,
        export,
        parallelize,
        plan,
        report,
        simulate,
        train,
        train_parallel,
        validate,
        verify,
        watch,
    )
    from shardwise.errors import RequestError, ShardwiseError, WorkerFailed
    from shardwise.strategy import Strategy
    from shardwise.workload.evaluation import Evaluation, Stopping
    from shardwise.workload.loading import Loading
    from shardwise.workload.parquet import ParquetRows
    from shardwise.workload.turns import Turn
    from shardwise.workload.workload import WarmStart, Workload

__all__ = [
    "Evaluation",
    "Loading",
    "ParquetRows",
    "RequestError",
    "ShardwiseError",
    "Stopping",
    "Strategy",
    "TrainedModel",
    "Turn",
    "WarmStart",
    "WorkerFailed",
    "Workload",
    "calibrate",
    "compare",
    "export",
    "parallelize",
    "plan",
    "report",
    "simulate",
    "train",
    "train_parallel",
    "validate",
    "verify",
    "watch",
]

_HOMES = {
    "Evaluation": "shardwise.workload.evaluation",
    "Loading": "shardwise.workload.loading",
    "ParquetRows": "shardwise.workload.parquet",
    "RequestError": "shardwise.errors",
    "ShardwiseError": "shardwise.errors",
    "Stopping": "shardwise.workload.evaluation",
    "Strategy": "shardwise.strategy",
    "Turn": "shardwise.workload.turns",
    "WarmStart": "shardwise.workload.workload",
    "WorkerFailed": "shardwise.errors",
    "Workload": "shardwise.workload.workload",
}
"""Modules of the public names; those that are not here are in `shardwise.api`."""


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import shardwise` is quick and does not need torch."""
    if name not in __all__:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES.get(name, "shardwise.api")), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
