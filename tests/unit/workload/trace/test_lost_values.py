"""A trace in which torch has lost the values of a tensor is made again, and never used."""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.errors import WorkloadError
from shardwise.workload.trace.graph import MOST_TRACES, trace
from shardwise.workload.workload import Workload


class Shifted(nn.Linear):
    """Layer whose forward makes a tensor by itself."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.tensor([1.0, 2.0])


def workload() -> Workload:
    return Workload(
        name="shifted",
        model=lambda: Shifted(3, 2),
        dataset=[torch.zeros(3)],
        inputs=lambda batch: batch,
        loss=lambda output, batch: output.mean(),
        optimizer=torch.optim.SGD,
        batch_size=1,
    )


def losing(times: int) -> tuple[list[int], Any]:
    """Make the first `times` exports lose the values of their constants; the list counts all exports."""
    exports: list[int] = []
    right = torch.export.export

    def export(*args: Any, **options: Any) -> Any:
        program = right(*args, **options)
        exports.append(0)
        if len(exports) <= times:
            empty = FakeTensorMode().from_tensor(torch.zeros(2))
            program._constants.update(dict.fromkeys(program.constants, empty))
        return program

    return exports, mock.patch("torch.export.export", export)


def test_it_is_traced_again() -> None:
    exports, lost = losing(2)
    with lost:
        found = trace(workload(), Shifted(3, 2), torch.zeros(1, 3))
    assert len(exports) == 3
    assert [each.tolist() for each in found.constants.values()] == [[1.0, 2.0]]


def test_it_is_traced_again_where_torch_says_so() -> None:
    right, calls = torch.export.export, list[int]()

    def export(*args: Any, **options: Any) -> Any:
        calls.append(0)
        if len(calls) == 1:
            raise RuntimeError("We found a fake tensor in the exported program constant's list: model.lifted_tensor_0")
        return right(*args, **options)

    with mock.patch("torch.export.export", export):
        found = trace(workload(), Shifted(3, 2), torch.zeros(1, 3))
    assert len(calls) == 2
    assert [each.tolist() for each in found.constants.values()] == [[1.0, 2.0]]


def test_values_that_stay_lost_are_an_error() -> None:
    exports, lost = losing(MOST_TRACES)
    with (
        lost,
        pytest.raises(WorkloadError, match=r"has no values for .*: make the tensor from the batch, or make it a"),
    ):
        trace(workload(), Shifted(3, 2), torch.zeros(1, 3))
    assert len(exports) == MOST_TRACES
