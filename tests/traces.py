"""Traces that the processes of a test session share: tracing a step takes longer than training on it.

A worker keeps its traces from one test to the next. Those of workloads that are known by more than a name are shared
with all other processes of the session, through files: the first that needs one traces, and the others read.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import io
import os
import pickle
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import cloudpickle
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._pytree import tree_leaves

FOLDER = "SHARDWISE_TEST_TRACES"
"""Environment variable that names the folder of the files; without it, nothing is shared."""

_KEPT: dict[Any, Any] = {}
_META = ("nn_module_stack", "stack_trace", "val")
"""Entries of the `meta` of a node that the program reads."""


@contextmanager
def remembered(origin: Any) -> Iterator[None]:
    """While it is open, steps of one workload are traced once for each shape, precision and mode.

    The workload is known again by its origin, such as the function that makes it, as that is pickled: with all that it
    is made of. If the origin is a name, other processes may mean something else by it.
    """
    from shardwise.parallel.graph import graph_engine
    from shardwise.parallel.graph.trace import traced as trace
    from shardwise.workload.precision import is_for_gpu

    name = origin if isinstance(origin, str) else cloudpickle.dumps(origin)

    def traced(workload: Any, model: Any, batch: Any, *, training: bool = True, evaluation: int = 0) -> Any:
        shapes = tuple((x.shape, x.dtype) if isinstance(x, Tensor) else x for x in tree_leaves(batch))
        key = (name, workload.precision, is_for_gpu(), training, evaluation, shapes)
        if key in _KEPT:
            return _KEPT[key]
        with _file(key) as file:
            step = _read(file)
            if step is None:
                step = trace(workload, model, batch, training=training, evaluation=evaluation)
                if step.opaque:  # modules in it are changed by who runs it
                    return step
                _write(file, step)
        _KEPT[key] = step
        return step

    with mock.patch.object(graph_engine, "traced", traced):
        yield


@contextmanager
def _file(key: tuple[Any, ...]) -> Iterator[Path | None]:
    """While it is open, no other process traces this step. Yields the file of the step; None if it is not shared."""
    folder = os.environ.get(FOLDER)
    if folder is None or isinstance(key[0], str):
        yield None
        return
    path = Path(folder, hashlib.sha256(repr(key).encode()).hexdigest())
    with path.with_suffix(".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # closing the file gives it back
        yield path


def _read(file: Path | None) -> Any:
    return None if file is None or not file.exists() else cloudpickle.loads(file.read_bytes())


def _write(file: Path | None, step: Any) -> None:
    if file is None:
        return
    written = io.BytesIO()
    with contextlib.suppress(pickle.PicklingError, TypeError, AttributeError):  # what cannot be pickled, each traces
        _Pickler(written).dump(step)
        file.with_suffix(".part").write_bytes(written.getvalue())
        file.with_suffix(".part").rename(file)


class _Pickler(cloudpickle.Pickler):  # type: ignore[misc]
    """Pickler that can write graphs, operations and tensors without data."""

    def __init__(self, file: io.BytesIO) -> None:
        super().__init__(file)
        self._mode = FakeTensorMode()

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, fx.Graph):
            return _graph, (_records(value),)
        if isinstance(value, torch._ops.OpOverload):
            return _operation, (*str(value._schema.name).split("::"), value._overloadname)
        if isinstance(value, FakeTensor):
            return _fake, (self._mode, value.shape, value.stride(), value.dtype, value.device, value.requires_grad)
        if value is self._mode:
            return _mode, ()
        return super().reducer_override(value)


class _Place(int):
    """Number of a node in its graph."""


def _records(graph: fx.Graph) -> list[tuple[Any, ...]]:
    places = {node: _Place(number) for number, node in enumerate(graph.nodes)}
    return [
        (
            node.op,
            node.target,
            *fx.map_arg((node.args, node.kwargs), places.__getitem__),
            node.name,
            {key: node.meta[key] for key in _META if key in node.meta},
        )
        for node in graph.nodes
    ]


def _graph(records: list[tuple[Any, ...]]) -> fx.Graph:
    graph, nodes = fx.Graph(), list[fx.Node]()
    for op, target, args, kwargs, name, meta in records:
        given = fx.node.map_aggregate((args, kwargs), lambda each: nodes[each] if isinstance(each, _Place) else each)
        nodes.append(graph.create_node(op, target, *given, name=name))
        assert nodes[-1].name == name
        nodes[-1].meta.update(meta)
    return graph


def _operation(namespace: str, name: str, overload: str) -> Any:
    return getattr(getattr(getattr(torch.ops, namespace), name), overload)


def _fake(mode: FakeTensorMode, shape: Any, stride: Any, dtype: Any, device: Any, requires_grad: bool) -> Tensor:
    with mode:
        return torch.empty_strided(shape, stride, dtype=dtype, device=device, requires_grad=requires_grad)


def _mode() -> FakeTensorMode:
    return FakeTensorMode(allow_non_fake_inputs=True)  # as the exporter's
