"""Equal layers of a model are found, and nothing else is taken for equal."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from shardwise.workload.load import load_workload
from shardwise.workload.trace.repeated_layers import repeated_layers, shortened


class Layer(nn.Module):
    def __init__(self, width: int, layer_idx: int, window: int = 0) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.layer_idx, self.window = layer_idx, window

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = x + self.linear(x)
        return output


class Model(nn.Module):
    def __init__(self, layers: list[nn.Module]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def test_numbered_layers_are_equal() -> None:
    model = Model([Layer(4, index) for index in range(5)])
    assert repeated_layers(model) is model.layers
    names, x = list(model.state_dict()), torch.ones(1, 4)
    whole = model(x)
    with shortened(model.layers, 2):
        assert len(model.layers) == 2
        assert torch.equal(model(x), model.layers[1](model.layers[0](x)))
    assert list(model.state_dict()) == names
    assert torch.equal(model(x), whole)


def frozen(layer: Layer) -> Layer:
    return layer.requires_grad_(False)


@pytest.mark.parametrize(
    "odd", [Layer(8, 2), Layer(4, 2, window=7), frozen(Layer(4, 2)), Layer(4, 2).half(), nn.Linear(4, 4)]
)
def test_one_that_differs(odd: nn.Module) -> None:
    assert repeated_layers(Model([Layer(4, 0), Layer(4, 1), odd])) is None


def test_shared_layers_are_not_repeated() -> None:
    layer = Layer(4, 0)
    assert repeated_layers(Model([layer, layer, layer])) is None


def test_recipe() -> None:
    model = load_workload("language", {"layers": 6}).model()
    assert repeated_layers(model) is model.blocks
