"""A compiled Keras model and its data as a workload: `compile` names the optimizer, the loss and a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.errors import WorkloadError
from shardwise.workload.keras.module import KerasModule, named_variables, use_torch_dropout
from shardwise.workload.keras.optimizers import schedule_of, translated
from shardwise.workload.keras.saved import load_saved_weights
from shardwise.workload.workload import Evaluation, Workload

Data = Any
"""Array or tensor with samples along the first dimension, or a list of them for a model of several inputs."""


def is_keras_model(value: Any) -> bool:
    """Return whether a value is a Keras model, without importing Keras."""
    kinds = (f"{kind.__module__}.{kind.__qualname__}" for kind in type(value).__mro__)
    return any(kind.startswith("keras.") and kind.endswith(".Model") for kind in kinds)


def workload(
    model: Any,
    x: Data,
    y: Data,
    *,
    batch_size: int = 32,
    epochs: float = 1,
    validation_data: tuple[Data, Data] | None = None,
    weights: str | Path | None = None,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    loss: Callable[[Any, Any], Tensor] | None = None,
    name: str = "",
    **fields: Any,
) -> Workload:
    """Return the workload of a compiled Keras 3 model; the arguments are those of `model.fit`, by their names.

    Args:
        model: built or buildable Keras model with one output, on Keras's torch backend.
        x: inputs, an array or tensor, a list of them, or a dict by the names of the model's inputs.
        y: labels.
        batch_size: global batch size.
        epochs: passes over the data.
        validation_data: held-out inputs and labels; measured by the first metric of `compile`, else by the loss.
        weights: file of saved weights to start from: `.weights.h5`, `.keras`, or `.h5` of Keras 2.
        optimizer: function that makes a torch optimizer, in place of the compiled one.
        loss: function of (labels, output), in place of the compiled one.
        name: name in runs and reports; None: the class of the model.
        fields: further fields of `Workload`.

    Raises:
        WorkloadError: the model is not compiled, runs on another backend, or has a part that cannot be taken over.
    """
    _check_backend()
    if not is_keras_model(model):
        raise WorkloadError(f"workload() needs a Keras model, not a value of type {type(model).__name__}")
    if not getattr(model, "compiled", False) and (optimizer is None or loss is None):
        raise WorkloadError(f"Keras model {model.name!r} is not compiled: call model.compile(optimizer, loss)")
    inputs, labels = _inputs(model, x), _tensor(y, "y")
    _build(model, inputs)
    use_torch_dropout(model)
    if weights is not None:
        load_saved_weights(model, weights)
    compiled = _loss(model) if loss is None else loss
    measured = _measured(model, compiled)
    fields = {**_optimizer_fields(model), **fields} if optimizer is None else {"optimizer": optimizer, **fields}
    if validation_data is not None:
        held_out = TensorDataset(*_inputs(model, validation_data[0]), _tensor(validation_data[1], "y"))
        fields["evaluation"] = _evaluation(model, held_out, measured)
    return Workload(
        name=name or type(model).__name__,
        model=_maker(model),
        dataset=TensorDataset(*inputs, labels),
        inputs=lambda batch: (list(batch[:-1]),) if len(batch) > 2 else batch[0],
        loss=measured,
        batch_size=batch_size,
        epochs=epochs,
        libraries=("keras",),
        **fields,
    )


def of_function(model: Any, x: Data, y: Data, validation_data: tuple[Data, Data] | None = None) -> Workload:
    """Return the workload of the values that a function returned: `model, x, y` or `model, x, y, (x_val, y_val)`.

    The batch size is that of `model.fit` by default. Raises WorkloadError as `workload`.
    """
    return workload(model, x, y, validation_data=validation_data)


def _maker(model: Any) -> Callable[[], KerasModule]:
    return lambda: KerasModule(model)


def _check_backend() -> None:
    """Check that Keras runs on torch. Raises WorkloadError."""
    try:
        import keras
    except ImportError as error:
        raise WorkloadError(f"Keras cannot be imported ({error}): pip install 'shardwise[keras]'") from None
    if keras.backend.backend() != "torch":
        raise WorkloadError(
            f"Keras runs on {keras.backend.backend()}: set KERAS_BACKEND=torch in the environment before it is imported"
        )


def _build(model: Any, inputs: list[Tensor]) -> None:
    """Make the variables of a model by a call with one sample."""
    sample = [each[:1] for each in inputs]
    with torch.no_grad():
        output = model(sample if len(sample) > 1 else sample[0])
    if not isinstance(output, Tensor):
        raise WorkloadError(
            f"Keras model {model.name!r} has several outputs: a workload needs one; write a shardwise.Workload with "
            "model=lambda: KerasModule(model) and a loss of your own"
        )


def _loss(model: Any) -> Callable[[Any, Any], Tensor]:
    """Return the compiled loss as a function of (labels, output) that gives the mean. Raises WorkloadError."""
    import keras

    given = model.loss
    if given is None or isinstance(given, dict | list | tuple):
        raise WorkloadError(f"Keras model {model.name!r} was compiled with loss={given!r}: one loss is needed")
    found = keras.losses.get(given)
    reduction = getattr(found, "reduction", "sum_over_batch_size")
    if reduction not in ("sum_over_batch_size", "mean"):
        raise WorkloadError(f"the loss has reduction={reduction!r}: it must be the mean over the samples")
    if isinstance(found, keras.losses.Loss):
        return found  # type: ignore[no-any-return]

    def mean(labels: Any, output: Any) -> Tensor:
        if (
            labels.dim() == output.dim() - 1 and output.shape[-1] == 1
        ):  # Keras accepts labels without the last dimension
            labels = labels.unsqueeze(-1)
        value: Tensor = found(labels, output).mean()
        return value

    return mean


def _measured(model: Any, loss: Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Return the loss of (output, batch), with the model's penalties."""
    penalized = bool(model.losses)

    def of_batch(output: Any, batch: Any) -> Tensor:
        value, penalty = output if penalized else (output, 0.0)
        total: Tensor = loss(batch[-1], value) + penalty
        return total

    return of_batch


def _optimizer_fields(model: Any) -> dict[str, Any]:
    """Return the fields of a workload that say what the compiled optimizer does."""
    optimizer = model.optimizer
    fields: dict[str, Any] = {"optimizer": translated(optimizer)}
    if (schedule := schedule_of(optimizer)) is not None:
        fields["schedule"] = schedule
    if optimizer.global_clipnorm:
        fields["clip_norm"] = float(optimizer.global_clipnorm)
    names = dict(named_variables(model))
    spared = {names[id(each)] for each in model.trainable_variables if not optimizer._use_weight_decay(each)}
    if optimizer.weight_decay and spared:
        fields["groups"] = lambda name, _: {"weight_decay": 0.0} if name in spared else {}
    return fields


def _evaluation(model: Any, dataset: TensorDataset, measured: Callable[[Any, Any], Tensor]) -> Evaluation:
    """Return the evaluation by the first metric of `compile`, or by the loss without one. Raises WorkloadError."""
    import keras

    given = getattr(model._compile_metrics, "_user_metrics", None) if model._compile_metrics is not None else None
    first = next(iter(given), None) if isinstance(given, list | tuple) else given
    if first is None:
        return Evaluation(dataset=dataset, metric="loss", measure=measured, higher_is_better=False)
    if first in ("accuracy", "acc"):
        first = _accuracy(model)
    metric = keras.metrics.get(first)
    function = getattr(metric, "_fn", metric)
    if not callable(function) or isinstance(function, keras.metrics.Metric):
        raise WorkloadError(f"metric {first!r} is no mean over samples: give an Evaluation of your own as evaluation=")
    penalized = bool(model.losses)

    def measure(output: Any, batch: Any) -> Tensor:
        return torch.as_tensor(function(batch[-1], output[0] if penalized else output)).float().mean()

    name = getattr(metric, "name", getattr(metric, "__name__", "metric"))
    return Evaluation(dataset=dataset, metric="accuracy" if "accuracy" in name else name, measure=measure)


def _accuracy(model: Any) -> str:
    """Return the kind of accuracy that fits the loss, as Keras chooses it."""
    text = str(getattr(model.loss, "name", getattr(model.loss, "__name__", model.loss))).lower()
    if "sparse" in text:
        return "sparse_categorical_accuracy"
    return "binary_accuracy" if "binary" in text else "categorical_accuracy"


def _inputs(model: Any, x: Data) -> list[Tensor]:
    """Return the inputs of a model in its own order; those of a dict are found by name. Raises WorkloadError."""
    if isinstance(x, Mapping):
        names = [each.name for each in getattr(model, "inputs", None) or ()]
        if set(names) != x.keys():
            raise WorkloadError(
                f"x is a dict of {', '.join(map(str, x))}, the inputs of Keras model {model.name!r} are "
                f"{', '.join(names) or 'without names: give a list in the order of its inputs'}"
            )
        x = [x[name] for name in names]
    return [_tensor(each, "x") for each in x] if isinstance(x, list | tuple) else [_tensor(x, "x")]


def _tensor(data: Any, what: str) -> Tensor:
    """Return an array as a tensor; floats become float32, as in Keras. Raises WorkloadError."""
    if isinstance(data, np.ndarray):
        data = torch.from_numpy(np.ascontiguousarray(data))
    if not isinstance(data, Tensor):
        raise WorkloadError(f"{what} must be an array or a tensor, not a value of type {type(data).__name__}")
    return data.float() if data.dtype == torch.float64 else data
