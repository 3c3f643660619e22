"""Shardwise plans a parallel strategy, predicts its cost, verifies that it computes the same, and trains with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shardwise.version import __version__ as __version__

if TYPE_CHECKING:
    from shardwise.api import TrainedModel, parallelize, simulate, train, train_parallel, verify
    from shardwise.errors import ShardwiseError
    from shardwise.strategy import Strategy
    from shardwise.workload.workload import Evaluation, Workload

__all__ = [
    "Evaluation",
    "ShardwiseError",
    "Strategy",
    "TrainedModel",
    "Workload",
    "parallelize",
    "simulate",
    "train",
    "train_parallel",
    "verify",
]

_HOMES = {
    "Evaluation": "shardwise.workload.workload",
    "ShardwiseError": "shardwise.errors",
    "Strategy": "shardwise.strategy",
    "TrainedModel": "shardwise.api",
    "Workload": "shardwise.workload.workload",
    "parallelize": "shardwise.api",
    "simulate": "shardwise.api",
    "train": "shardwise.api",
    "train_parallel": "shardwise.api",
    "verify": "shardwise.api",
}


def __getattr__(name: str) -> Any:
    """Import a public name when it is first used, so that `import shardwise` is quick and does not need torch."""
    if name not in _HOMES:
        raise AttributeError(f"module 'shardwise' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
