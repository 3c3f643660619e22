"""Traces that a worker keeps from one test to the next: tracing a step takes longer than training on it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import cloudpickle
import torch
from torch.utils._pytree import tree_leaves

_KEPT: dict[Any, Any] = {}


@contextmanager
def remembered(factory: Callable[..., Any] | str) -> Iterator[None]:
    """While it is open, steps of the workload that `factory` makes are traced once for each shape, precision and mode.

    A factory is known again by its name, or as it is pickled: with all that it is made of.
    """
    from shardwise.parallel.graph import graph_engine
    from shardwise.parallel.graph.trace import traced as trace

    name = factory if isinstance(factory, str) else cloudpickle.dumps(factory)

    def traced(workload: Any, model: Any, batch: Any, *, training: bool = True, evaluation: int = 0) -> Any:
        shapes = tuple((x.shape, x.dtype) if isinstance(x, torch.Tensor) else x for x in tree_leaves(batch))
        key = (name, workload.precision, training, evaluation, shapes)
        step = _KEPT.get(key) or trace(workload, model, batch, training=training, evaluation=evaluation)
        if not step.opaque:  # modules in it are changed by who runs it
            _KEPT[key] = step
        return step

    with mock.patch.object(graph_engine, "traced", traced):
        yield
