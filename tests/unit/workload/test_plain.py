from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from shardwise.errors import DataError, WorkloadError
from shardwise.workload.plain import accuracy, plain_workload

DATA, LABELS = torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2])
OUTPUT = torch.randn(6, 3)
BATCH = (DATA, LABELS)


def make(loss: Any = F.cross_entropy, dataset: Any = BATCH, **fields: Any) -> Any:
    return plain_workload(fields.pop("model", nn.Linear(4, 3)), dataset, loss, batch_size=2, **fields)


def of_labels(output: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(output, labels)


def of_batch(output: Tensor, batch: tuple[Tensor, Tensor]) -> Tensor:
    return F.cross_entropy(output, batch[1])


@pytest.mark.parametrize(
    "loss",
    [
        nn.CrossEntropyLoss(),
        F.cross_entropy,
        partial(F.cross_entropy, reduction="mean"),
        of_labels,
        of_batch,
        lambda output, y: F.cross_entropy(output, y),
    ],
)
def test_every_usual_kind_of_loss(loss: Any) -> None:
    workload = make(loss)
    assert torch.equal(workload.loss(OUTPUT, BATCH), F.cross_entropy(OUTPUT, LABELS))
    assert torch.equal(workload.inputs(BATCH), DATA)


def test_with_inputs_the_loss_gets_the_batch() -> None:
    workload = make(lambda output, b: b["scale"] * output.sum(), TensorDataset(DATA), inputs=lambda b: b["x"])
    batch = {"x": DATA, "scale": torch.tensor(2.0)}
    assert torch.equal(workload.inputs(batch), DATA)
    assert torch.equal(workload.loss(OUTPUT, batch), 2 * OUTPUT.sum())


def test_model_is_copied_or_made() -> None:
    model = nn.Linear(4, 3)
    copy = make(model=model).model()
    assert copy is not model
    assert torch.equal(copy.weight, model.weight)
    assert isinstance(make(model=lambda: nn.Linear(4, 3)).model(), nn.Linear)
    assert make(model=model).name == "Linear"


def test_defaults_and_fields() -> None:
    workload = make(clip_norm=1.0, seed=3)
    optimizer = workload.optimizer(nn.Linear(4, 3).parameters())
    assert isinstance(optimizer, torch.optim.AdamW)
    assert (workload.clip_norm, workload.seed, workload.batch_size, workload.weight) == (1.0, 3, 2, None)
    assert len(workload.dataset) == 6


def test_evaluation() -> None:
    workload = make(evaluation=BATCH, metric="accuracy")
    assert workload.evaluation.metric == "accuracy"
    assert torch.equal(workload.evaluation.measure(OUTPUT, BATCH), accuracy(OUTPUT, LABELS))

    def top1_error(output: Tensor, labels: Tensor) -> Tensor:
        return 1 - accuracy(output, labels)

    evaluation = make(evaluation=TensorDataset(*BATCH), metric=top1_error).evaluation
    assert evaluation.metric == "top1_error"
    assert evaluation.measure(OUTPUT, BATCH).item() == pytest.approx(1 - accuracy(OUTPUT, LABELS).item())


def test_weights_of_classification_losses_are_kept() -> None:
    classes = torch.tensor([1.0, 2.0, 4.0])
    weight = make(nn.CrossEntropyLoss(weight=classes)).weight
    assert weight(BATCH).item() == 14
    ignoring = torch.tensor([0, -100, 2, 0, 1, 2])
    weight = make(nn.CrossEntropyLoss(), (DATA, ignoring)).weight
    assert weight((DATA, ignoring)).item() == 5
    assert make(nn.CrossEntropyLoss()).weight is None
    assert make(nn.CrossEntropyLoss(), weight=len).weight is len


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"loss": nn.CrossEntropyLoss(reduction="sum")}, WorkloadError, "reduction='sum'"),
        ({"loss": 3}, WorkloadError, "loss must be a function"),
        ({"model": 3}, WorkloadError, r"model must be an nn\.Module"),
        ({"dataset": (DATA, LABELS[:5])}, DataError, "6 samples and 5 labels"),
        ({"evaluation": BATCH, "metric": "acuracy"}, WorkloadError, "metric='acuracy'"),
    ],
)
def test_wrong_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make(**arguments)
