"""A Keras model as a torch module.

A Keras layer reads its variables, not the parameters of a module, so a strategy that replaces parameters (a shard, a
traced value) would not reach it. `KerasModule` owns the values as parameters and buffers, and calls the model as a
function of them (`stateless_call`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from shardwise.errors import WorkloadError


class _Shared:
    """Keras model that copies of a module share: it is called with their values, and holds none of them."""

    def __init__(self, model: Any) -> None:
        self.model = model

    def __deepcopy__(self, memo: dict[int, Any]) -> _Shared:
        return self


class KerasModule(nn.Module):
    """Built Keras model with its trainable variables as parameters and the others as buffers.

    Its output is that of the model, or (output, penalty) if the model has regularizers.
    """

    def __init__(self, model: Any) -> None:
        super().__init__()
        self._shared = _Shared(model)
        self._trained: list[str] = []
        self._others: list[str] = []
        names = dict(named_variables(model))
        for variable in model.trainable_variables:
            self._trained.append(names[id(variable)])
            self.register_parameter(names[id(variable)], nn.Parameter(_value(variable)))
        for variable in model.non_trainable_variables:
            self._others.append(names[id(variable)])
            self.register_buffer(names[id(variable)], _value(variable))
        self.penalized = bool(model.losses)

    def forward(self, *inputs: Any) -> Any:
        """Call the model with this module's values, in its mode; changed variables go back into the buffers."""
        import keras

        first = next(each for each in _leaves(inputs) if isinstance(each, Tensor))
        trained = [getattr(self, name) for name in self._trained]
        others = [getattr(self, name) for name in self._others]
        with keras.device(str(first.device)):
            output, changed, losses = self._shared.model.stateless_call(
                trained, others, *inputs, training=self.training, return_losses=True
            )
        if self.training:
            for old, new in zip(others, changed, strict=True):
                if new is not old:
                    old.copy_(new)
        return (output, torch.stack([loss.reshape(()) for loss in losses]).sum()) if self.penalized else output

    def write_back(self) -> None:
        """Assign the values of this module to the variables of the Keras model."""
        model = self._shared.model
        names = [*self._trained, *self._others]
        for name, variable in zip(names, [*model.trainable_variables, *model.non_trainable_variables], strict=True):
            variable.assign(getattr(self, name).detach())


def named_variables(model: Any) -> Iterator[tuple[int, str]]:
    """Yield the identity and a name of each variable: `layers/NUMBER/NAME`.

    Keras numbers layers as a process makes them, so that its own paths differ from process to process.
    """
    seen: set[int] = set()
    for place, layer in [*((f"layers/{number}", layer) for number, layer in enumerate(model.layers)), ("model", model)]:
        count: Counter[str] = Counter()
        for variable in layer.variables:
            if id(variable) in seen:
                continue
            seen.add(id(variable))
            repeated = count[variable.name]
            count[variable.name] += 1
            yield id(variable), f"{place}/{variable.name}" + (f"/{repeated}" if repeated else "")


def use_torch_dropout(model: Any) -> None:
    """Let dropout layers draw from torch's generator, which Shardwise splits, instead of generators of their own.

    Raises:
        WorkloadError: another layer draws random numbers, which differ once a batch is split.
    """
    import keras

    for layer in model._flatten_layers():
        if type(layer) is keras.layers.Dropout and layer.noise_shape is None:
            object.__setattr__(layer, "call", _dropout(float(layer.rate)))
        elif getattr(layer, "seed_generator", None) is not None and _rate(layer):
            raise WorkloadError(
                f"layer {layer.name!r} ({type(layer).__name__}) draws random numbers by a generator of its own, which "
                "a split batch would draw otherwise: use keras.layers.Dropout, or put it into the dataset"
            )


def _rate(layer: Any) -> float:
    """Return the share of values that a layer drops; 1 for a layer that draws for something else."""
    rates = [getattr(layer, name) for name in ("rate", "dropout") if hasattr(layer, name)]
    return float(max(rates, default=1.0))


def _dropout(rate: float) -> Any:
    def call(inputs: Tensor, training: bool = False) -> Tensor:
        return F.dropout(inputs, rate, bool(training))

    return call


def _value(variable: Any) -> Tensor:
    value: Tensor = variable.value.detach().clone()
    return value


def _leaves(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for each in value:
            yield from _leaves(each)
    elif isinstance(value, dict):
        yield from _leaves(list(value.values()))
    else:
        yield value
