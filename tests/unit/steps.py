"""Steps of small modules as one of several tensor-parallel workers would compute them: to look at, not to run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.parallel.check import split
from shardwise.parallel.tensor.partitioner import LocalGraph, Obstacle
from shardwise.parallel.tensor.placement import Sharded
from shardwise.workload.trace.graph import StepGraph, example, trace
from shardwise.workload.workload import Workload

EXCHANGES = ("enter", "reduce", "gather", "slice", "gather_enter", "reduce_scatter")


def workload(model: Callable[[], nn.Module], x: Tensor, **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "step",
        "model": model,
        "dataset": TensorDataset(x),
        "inputs": lambda batch: batch[0],
        "loss": lambda output, batch: output.square().mean(),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "batch_size": len(x),
    }
    return Workload(**{**options, **changes})


def step_of(work: Workload, training: bool = True) -> tuple[nn.Module, StepGraph]:
    model = work.model()
    return model, trace(work, model, example(work, work.batch_size), training=training)


def local(
    model: Callable[[], nn.Module], x: Tensor, ranks: int, *, sequence: bool = False, **changes: Any
) -> tuple[LocalGraph, tuple[Obstacle, ...]]:
    module, step = step_of(workload(model, x, **changes))
    trained = frozenset(name for name, parameter in module.named_parameters() if parameter.requires_grad)
    return split(step, ranks, trained, sequence=sequence)


def exchanges(graph: LocalGraph) -> dict[str, int]:
    """Count the exchanges of each kind in a step."""
    names = [getattr(node.target, "__name__", "") for node in graph.graph.nodes if node.op == "call_function"]
    return dict(Counter(name for name in names if name in EXCHANGES))


def cuts(graph: LocalGraph) -> dict[str, tuple[int, tuple[int, ...]] | None]:
    """(dimension, segments) of each tensor that is cut; None: whole on every worker."""
    return {
        name: (place.dim, place.spans) if isinstance(place, Sharded) else None
        for name, place in graph.placements.items()
    }
