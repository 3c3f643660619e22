"""Which values of a step share memory, and what must therefore stay on one worker."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from steps import step_of, workload
from torch import Tensor, nn

from shardwise.parallel.tensor.aliasing import changed_under_another_name, roots, together
from shardwise.workload.trace.graph import StepGraph

Function = Callable[[Any, Tensor], Tensor]
"""Trace a function of a `Compute`, whose layers and buffer it uses, and a batch."""


class Compute(nn.Module):
    def __init__(self, compute: Function) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("seen", torch.zeros(8))
        self.compute = compute

    def forward(self, x: Tensor) -> Tensor:
        return self.compute(self, x)


def traced(compute: Function) -> StepGraph:
    return step_of(workload(lambda: Compute(compute), torch.randn(4, 8)))[1]


def changed(compute: Function) -> set[str]:
    graph = traced(compute).graph
    return {node.name for node in changed_under_another_name(graph, roots(graph))}


def test_a_view_is_in_the_memory_of_what_it_is_a_view_of() -> None:
    graph = traced(lambda m, x: m.linear(x).view(2, 16).transpose(0, 1)[1:].split(3)[0] * 2).graph
    found = {node.name: root.name for node, root in roots(graph).items()}
    assert {found[name] for name in ("linear", "view", "transpose", "slice_1", "split", "getitem")} == {"linear"}
    assert found["mul"] == "mul"


def through_a_view(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.linear(x)
    y[:, 1:3].add_(1)
    return y


def under_a_view(m: Any, x: Tensor) -> Tensor:
    y: Tensor = m.linear(x) * 1
    part = y[:, 1:3]
    y.mul_(2)
    return y.sum() + part


def test_a_change_that_is_read_under_another_name() -> None:
    assert changed(through_a_view) == {"linear"}
    assert changed(under_a_view) == {"mul"}


def test_a_change_that_is_not() -> None:
    assert changed(lambda m, x: m.linear(x).relu_() + 1) == set()
    assert changed(lambda m, x: m.linear(x).view(2, 16).relu_()) == set()

    def halves(m: Any, x: Tensor) -> Tensor:
        y: Tensor = m.linear(x).clone()
        a, b = y[:, :4], y.unbind(1)
        return a.sum() + b[0] * b[1]

    assert changed(halves) == set()


def ranges(compute: Function) -> list[tuple[str, str]]:
    step = traced(compute)
    buffers = {name for name, tensor in step.tensors.items() if tensor in dict(Compute(compute).named_buffers())}
    return [(first.name, last.name) for first, last in together(step.graph, buffers)]


def reads_after_writing(m: Any, x: Tensor) -> Tensor:
    m.seen.add_(x.mean(0))
    output: Tensor = m.linear(x) - m.seen
    return output


def changes_the_batch(m: Any, x: Tensor) -> Tensor:
    x[:, 0] = 0
    output: Tensor = m.linear(x) + x
    return output


@pytest.mark.parametrize(
    ("compute", "expected"),
    [
        (lambda m, x: m.linear(x).relu_(), []),
        (through_a_view, [("linear", "add_")]),
        (reads_after_writing, [("add_", "sub")]),
        (lambda m, x: m.linear(x) - m.seen, []),
        (changes_the_batch, [("select", "add")]),
    ],
)
def test_what_must_stay_together(compute: Function, expected: list[tuple[str, str]]) -> None:
    assert ranges(compute) == expected


def test_a_normalisation_of_two_places_keeps_its_statistics_on_one_worker() -> None:
    found = ranges(lambda m, x: m.norm(m.linear(m.norm(x))))
    assert ("batch_norm", "batch_norm_1") in found
    assert all(first == last for first, last in ranges(lambda m, x: m.linear(m.norm(x))))
