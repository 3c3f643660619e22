"""A model of equal layers: what is predicted of it can be told from a few of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn


@dataclass(frozen=True, slots=True)
class DeepModel:
    """A model factory that can make the same model with fewer layers.

    Attributes:
        layers: how many the model has.
        build: number of layers -> the model; the layers are equal in everything but the values of their parameters.
    """

    layers: int
    build: Callable[[int], nn.Module]

    def __call__(self) -> nn.Module:
        """Builds the module."""
        return self.build(self.layers)

    def with_layers(self, layers: int) -> DeepModel:
        """The same with another number of layers."""
        return replace(self, layers=layers)


def deep_model(factory: Any) -> DeepModel | None:
    """A model factory as one of equal layers; None where it does not say that it is."""
    return factory if isinstance(factory, DeepModel) else None
