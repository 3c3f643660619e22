"""Metrics that are no mean: an object takes in the outputs of all replicas, in the order of the samples.

Every worker that holds outputs updates an object of its own with those of all replicas, joined. What the object takes
in is then what one process gives it, so no state has to be merged, whatever its kind.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from shardwise.errors import WorkloadError, blamed
from shardwise.parallel.data.whole_batch import of_all_replicas
from shardwise.parallel.engine import Evaluated
from shardwise.parallel.mesh import Mesh
from shardwise.workload.evaluation import Evaluation
from shardwise.workload.workload import Workload


def _never() -> bool:
    return False


_DEEPEST = 4
"""Largest depth in an object of the user at which objects of a library are looked for."""


def _parts_of(value: Any, depth: int = 0) -> Iterator[Any]:
    """Yield an object and the objects in its attributes and containers."""
    yield value
    if depth == _DEEPEST or isinstance(value, Tensor | str | bytes):
        return
    inner = value.values() if isinstance(value, Mapping) else vars(value).values() if hasattr(value, "__dict__") else ()
    for each in value if isinstance(value, list | tuple) else list(inner):
        yield from _parts_of(each, depth + 1)


class Collected:
    """Metric object of one evaluation on this worker.

    Args:
        evaluation: evaluation that `collects`.
        workload: its workload.
        mesh: this worker's position.

    Raises:
        WorkloadError: the object cannot be made.
    """

    def __init__(self, evaluation: Evaluation, workload: Workload, mesh: Mesh) -> None:
        self._evaluation, self._workload, self._mesh = evaluation, workload, mesh
        self._held = False
        with self._blamed("measure"):
            self._metric = evaluation.collector()
            if callable(move := getattr(self._metric, "to", None)):
                move(mesh.device)
        for part in _parts_of(self._metric):  # torchmetrics would join workers that have taken in the same
            if hasattr(part, "distributed_available_fn"):
                part.distributed_available_fn = _never

    def update(self, found: Evaluated, samples: int) -> None:
        """Take in a microbatch of `samples` samples of each replica. Collective over the replicas that hold outputs.

        Raises:
            WorkloadError: an output or a batch cannot be joined, or the object fails.
        """
        if not found.held:
            return
        self._held = True
        group = self._mesh.replica_group
        output, batch = found.output, found.batch
        if group is not None:
            output = of_all_replicas(output, samples, group, f"output for {self._evaluation.metric!r}")
            batch = of_all_replicas(batch, samples, group, f"batch for {self._evaluation.metric!r}")
        with self._blamed("update"):
            self._metric.update(output, batch)

    def value(self) -> float:
        """Return the metric on one worker of those that hold it, and 0 on all others.

        Raises:
            WorkloadError: the object fails, or gives no number.
        """
        if not self._held:
            return 0.0
        with self._blamed("compute"):
            value = torch.as_tensor(self._metric.compute())
        if value.numel() != 1:
            raise WorkloadError(
                f"metric {self._evaluation.metric!r} of workload {self._workload.name!r} computes a tensor of shape "
                f"{tuple(value.shape)}: must be one number"
            )
        first = self._mesh.replica == 0 and self._mesh.coordinate("tp") == 0
        return float(value) if first else 0.0

    def _blamed(self, method: str) -> AbstractContextManager[None]:
        return blamed(f"metric {self._evaluation.metric!r} of workload {self._workload.name!r} fails in {method}")
