"""Embeddings whose training depends on which samples share a worker are refused by name."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from shardwise.errors import WorkloadError
from shardwise.parallel.operators.refused_modules import check_modules
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload


def workload(model: nn.Module) -> Workload:
    return Workload(
        name="words",
        model=lambda: model,
        dataset=[torch.zeros(3, dtype=torch.long)],
        inputs=lambda batch: batch,
        loss=lambda output, batch: output.mean(),
        optimizer=torch.optim.SGD,
        batch_size=1,
    )


def model(kind: Any, **options: Any) -> nn.Module:
    return nn.ModuleDict({"words": kind(12, 4, **options), "last": nn.Linear(4, 4)})


@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"max_norm": 1.0}, "words of workload 'words' has max_norm=1, "),
        ({"scale_grad_by_freq": True}, "words of workload 'words' has scale_grad_by_freq"),
        ({"sparse": True}, "words of workload 'words' has sparse=True"),
    ],
)
@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
def test_refused_by_name(kind: Any, options: dict[str, Any], said: str, strategy: str) -> None:
    made = model(kind, **options)
    with pytest.raises(WorkloadError, match=said):
        check_modules(workload(made), Strategy.parse(strategy), made)
    check_modules(workload(made), Strategy(), made)


def test_others_are_not() -> None:
    made = model(nn.Embedding, padding_idx=0)
    check_modules(workload(made), Strategy(dp=2), made)
