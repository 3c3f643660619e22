"""Build a `Workload` from the parts of a plain training script: a model, a dataset and a loss."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.errors import DataError, WorkloadError
from shardwise.workload.workload import Evaluation, Workload

Function = Callable[..., Any]


def plain_workload(
    model: nn.Module | Callable[[], nn.Module],
    dataset: Any,
    loss: Function,
    *,
    batch_size: int,
    inputs: Function | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    evaluation: Any = None,
    metric: str | Function = "loss",
    name: str = "",
    **fields: Any,
) -> Workload:
    """Build a workload from the objects of a training script; `api.train_parallel` describes each argument.

    Raises:
        WorkloadError: an argument is of the wrong kind.
        DataError: a pair of tensors has different numbers of samples and labels.
    """
    if not callable(model):
        raise WorkloadError(f"model must be an nn.Module or a function that makes one, not {model!r}")
    if not callable(loss):
        raise WorkloadError(f"loss must be a function of (output, labels) or (output, batch), not {loss!r}")
    data = _dataset(dataset, "dataset")
    weight = _criterion_weight(loss, dataset) if inputs is None else None
    fields = {"weight": weight, **fields} if fields.get("weight") is None else fields
    return Workload(
        name=name or (type(model).__name__ if isinstance(model, nn.Module) else getattr(model, "__name__", "model")),
        model=_factory(model),
        dataset=data,
        inputs=inputs or _first,
        loss=_of_batch(loss, pairs=inputs is None),
        optimizer=optimizer or _default_optimizer,
        batch_size=batch_size,
        evaluation=None if evaluation is None else _evaluation(evaluation, metric, loss, pairs=inputs is None),
        **fields,
    )


def _factory(model: nn.Module | Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    if not isinstance(model, nn.Module):
        return model
    instance = model
    return lambda: copy.deepcopy(instance)


def _dataset(dataset: Any, what: str) -> Any:
    if not (isinstance(dataset, tuple | list) and len(dataset) == 2 and all(isinstance(t, Tensor) for t in dataset)):
        return dataset
    data, labels = dataset
    if len(data) != len(labels):
        raise DataError(f"{what}: {len(data)} samples and {len(labels)} labels; there must be one label per sample")
    return TensorDataset(data, labels)


def _first(batch: Any) -> Any:
    return batch[0]


def _default_optimizer(parameters: Iterable[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=1e-3)


def _of_batch(function: Function, *, pairs: bool) -> Function:
    """Adapt a function of (output, labels) to (output, batch), where labels are the second part of the batch."""
    if not pairs or _takes_batch(function):
        return function
    return lambda output, batch: function(output, batch[1])


def _takes_batch(function: Function) -> bool:
    """Return whether the second parameter of a function is called `batch`, as in `Workload.loss`."""
    if isinstance(function, nn.Module):
        return False
    try:
        names = list(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # a builtin without a signature
        return False
    return len(names) > 1 and names[1] == "batch"


def _criterion_weight(loss: Function, dataset: Any) -> Function | None:
    """Return the function of a batch that gives the total weight over which a torch classification loss averages.

    Returns None if the loss averages over the samples.

    Raises:
        WorkloadError: the loss is not a mean at all.
    """
    if isinstance(loss, nn.Module) and getattr(loss, "reduction", "mean") != "mean":
        raise WorkloadError(
            f"{type(loss).__name__} has reduction={loss.reduction!r}: the loss must be the mean over the samples, "
            "use reduction='mean'"
        )
    if not isinstance(loss, nn.CrossEntropyLoss | nn.NLLLoss):
        return None
    ignored, classes = loss.ignore_index, loss.weight
    labels = dataset[1] if isinstance(dataset, tuple | list) else None
    if classes is None and not (isinstance(labels, Tensor) and bool((labels == ignored).any())):
        return None

    def weight(batch: Any) -> Tensor:
        counted = batch[1][batch[1] != ignored]
        return (
            counted.new_tensor(len(counted)).float() if classes is None else classes.to(counted.device)[counted].sum()
        )

    return weight


def _evaluation(
    evaluation: Any, metric: str | Function, loss: Function, *, pairs: bool
) -> Evaluation | Sequence[Evaluation]:
    made = evaluation if isinstance(evaluation, list | tuple) else [evaluation]
    if any(isinstance(each, Evaluation) for each in made):
        return list(made)
    dataset = _dataset(evaluation, "evaluation")
    if metric == "accuracy":
        return Evaluation(dataset=dataset, metric="accuracy", measure=_of_batch(accuracy, pairs=pairs))
    if metric == "loss":
        return Evaluation(dataset=dataset, metric="loss", measure=_of_batch(loss, pairs=pairs), higher_is_better=False)
    if not callable(metric):
        raise WorkloadError(f"metric={metric!r}: known are 'accuracy', 'loss', or a function of (output, labels)")
    name = getattr(metric, "__name__", type(metric).__name__)
    return Evaluation(dataset=dataset, metric=name, measure=_of_batch(metric, pairs=pairs))


def accuracy(output: Tensor, labels: Tensor) -> Tensor:
    """Return the share of samples whose largest output, shape (samples, classes, ...), is at their label."""
    return (output.argmax(1) == labels).float().mean()
