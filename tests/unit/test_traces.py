"""A trace that a process of the tests reads is the one that another has written."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import traces
from torch import fx
from torch.utils._pytree import tree_leaves

from shardwise.parallel.graph import graph_engine
from shardwise.workload.recipes.gpt import gpt
from shardwise.workload.trace.graph import StepGraph, example
from shardwise.workload.workload import Workload


def small() -> Workload:
    return gpt(1, 16, 2, 1, vocabulary=256, sequence=8, batch_size=4)


def traced() -> StepGraph:
    """Trace a step as a process that remembers nothing of it."""
    workload = small()
    with mock.patch.object(traces, "_KEPT", {}), traces.remembered(small):
        trace: Any = vars(graph_engine)["traced"]
        step: StepGraph = trace(workload, workload.model(), example(workload, 2))
        return step


def described(node: fx.Node) -> tuple[Any, ...]:
    """Return all that the program reads of a node."""
    made = [
        (x.shape, x.stride(), x.dtype, x.device) if isinstance(x, torch.Tensor) else x
        for x in tree_leaves(node.meta.get("val"))
    ]
    around = str(node.meta.get("nn_module_stack")), node.meta.get("stack_trace")
    return node.name, node.op, node.target, str(node.args), str(node.kwargs), made, around


def test_a_trace_that_is_read_is_the_one_that_was_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(traces.FOLDER, str(tmp_path))
    made = traced()
    with mock.patch.object(traces, "_write", side_effect=AssertionError("it was traced again")):
        read = traced()
    assert read is not made
    assert [described(node) for node in read.graph.nodes] == [described(node) for node in made.graph.nodes]
    for name in ("tensors", "leaves", "training", "losses"):
        assert getattr(read, name) == getattr(made, name)
    assert read.constants.keys() == made.constants.keys()
    assert all(torch.equal(read.constants[name], made.constants[name]) for name in made.constants)
