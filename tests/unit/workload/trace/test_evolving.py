"""A step is traced again only if its forward pass has changed values in Python; the mode of its modules is none."""

from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
from torch import Tensor, nn

from shardwise.workload.trace import evolving, graph
from shardwise.workload.trace.evolving import trace_evolving
from shardwise.workload.workload import Evaluation, Workload


class Counting(nn.Linear):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        return super().forward(x) * self.calls


def workload() -> Workload:
    data = [torch.zeros(3)]
    return Workload(
        name="small",
        model=lambda: nn.Linear(3, 2),
        dataset=data,
        inputs=lambda batch: batch,
        loss=lambda output, batch: output.mean(),
        optimizer=torch.optim.SGD,
        batch_size=1,
        evaluation=Evaluation(dataset=data, metric="size", measure=lambda output, batch: output.abs().mean()),
    )


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(("kind", "traces"), [(nn.Linear, 1), (Counting, 2)])
def test_how_often_a_step_is_traced(kind: type[nn.Linear], traces: int, mode: bool, training: bool) -> None:
    model = nn.Sequential(nn.ReLU(), kind(3, 2)).train(mode)
    with mock.patch.object(evolving, "trace", wraps=graph.trace) as trace:
        _, found = trace_evolving(workload(), model, torch.zeros(1, 3), training=training, opaque={})
    assert trace.call_count == traces
    assert list(found) == (["1"] if kind is Counting else [])
    assert all(module.training == mode for module in model.modules())
    assert kind is not Counting or model[1].calls == 0


logger = logging.getLogger("shardwise_test_of_a_logger")


class Logging(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        logger.info("a pass")
        return super().forward(x)


def test_what_a_logger_remembers_is_no_change() -> None:
    logger.manager._clear_cache()  # type: ignore[attr-defined]
    model = nn.Sequential(nn.ReLU(), Logging(3, 2))
    with mock.patch.object(evolving, "trace", wraps=graph.trace) as trace:
        _, found = trace_evolving(workload(), model, torch.zeros(1, 3), training=True, opaque={})
    assert (trace.call_count, dict(found)) == (1, {})
