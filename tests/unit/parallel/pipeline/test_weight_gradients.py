"""Gradients of weights that are put off are the same gradients."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from steps import local
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from shardwise.parallel.pipeline.weight_gradients import WeightGradients, accumulate, defer_weights

aten = torch.ops.aten
KEY = (0, 0)
Case = tuple[Callable[..., Tensor], Callable[..., Tensor], list[nn.Parameter], Tensor]
"""Ours, torch's, their parameters, and what they are called with."""


def parameters(*shapes: tuple[int, ...]) -> list[nn.Parameter]:
    return [nn.Parameter(torch.randn(shape, dtype=torch.float64)) for shape in shapes]


def convolution(groups: int, transposed: bool, store: WeightGradients) -> Case:
    shape = (4, 6 // groups, 3, 3) if transposed else (6, 4 // groups, 3, 3)
    x = torch.randn(2, 4, 7, 7, dtype=torch.float64)
    options = ([2, 2], [1, 1], [1, 1], transposed, [1 * transposed] * 2, groups)

    def ours(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return store.convolution(x, weight, bias, *options)

    return ours, lambda x, w, b: torch.convolution(x, w, b, *options), parameters(shape, (6,)), x


def linear(store: WeightGradients) -> Case:
    return store.linear, F.linear, parameters((5, 4), (5,)), torch.randn(2, 3, 4, dtype=torch.float64)


CASES: dict[str, Callable[[WeightGradients], Case]] = {
    "linear": linear,
    "convolution": lambda store: convolution(1, False, store),
    "groups": lambda store: convolution(2, False, store),
    "transposed": lambda store: convolution(1, True, store),
    "transposed-groups": lambda store: convolution(2, True, store),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("recompute", [False, True])
def test_put_off_gradients_equal_autograds(case: str, recompute: bool) -> None:
    store = WeightGradients()
    ours, torchs, (weight, bias), x = CASES[case](store)
    x.requires_grad_()
    torchs(x, weight, bias).square().sum().backward()  # type: ignore[no-untyped-call]
    expected = [t.grad.clone() for t in (x, weight, bias) if t.grad is not None]
    assert len(expected) == 3
    for tensor in (x, weight, bias):
        tensor.grad = None
    output = checkpoint(ours, x, weight, bias, use_reentrant=False) if recompute else ours(x, weight, bias)
    store.begin(KEY)
    output.square().sum().backward()
    store.begin(None)
    torch.testing.assert_close(x.grad, expected[0])
    assert weight.grad is bias.grad is None  # put off
    store.compute(KEY)
    torch.testing.assert_close([weight.grad, bias.grad], expected[1:])
    store.compute(KEY)  # nothing is left
    torch.testing.assert_close(weight.grad, expected[1])


def test_not_deferring_is_autograd() -> None:
    store = WeightGradients()
    weight, bias = parameters((5, 4), (5,))
    x = torch.randn(3, 4, dtype=torch.float64)
    store.linear(x, weight, bias).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, x.sum(0).expand(5, 4))
    torch.testing.assert_close(bias.grad, torch.full((5,), 3.0, dtype=torch.float64))


def test_what_is_no_leaf_gets_its_gradient_at_once() -> None:
    store = WeightGradients()
    (weight,) = parameters((5, 4))
    store.begin(KEY)
    store.linear(torch.ones(3, 4, dtype=torch.float64), weight * 2).sum().backward()  # type: ignore[no-untyped-call]
    torch.testing.assert_close(weight.grad, torch.full((5, 4), 6.0, dtype=torch.float64))


def test_what_is_frozen_gets_none() -> None:
    store = WeightGradients()
    weight, bias = parameters((5, 4), (5,))
    weight.requires_grad_(False)
    store.begin(KEY)
    store.linear(torch.ones(3, 4, dtype=torch.float64), weight, bias).sum().backward()  # type: ignore[no-untyped-call]
    store.compute(KEY)
    assert weight.grad is None
    assert bias.grad is not None


def test_gradients_add_up() -> None:
    (weight,) = parameters((2,))
    for _ in range(3):
        accumulate(weight, torch.ones(2, dtype=torch.float32))
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float64
    assert weight.grad.tolist() == [3.0, 3.0]


def test_layers_with_parameters_are_replaced() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.back = nn.Conv1d(4, 8, 3, dilation=2), nn.ConvTranspose1d(8, 4, 3, stride=2)
            self.linear = nn.Linear(4, 4)

        def forward(self, x: Tensor) -> Tensor:
            y = self.back(self.conv(x)).transpose(1, 2)
            return F.linear(self.linear(y), self.linear.weight * 2)

    graph, _ = local(Model, torch.randn(2, 4, 9), 1)
    store = WeightGradients()
    defer_weights(graph.graph, store, graph.step.tensors)
    targets = [node.target for node in graph.graph.nodes if node.op == "call_function"]
    assert targets.count(store.convolution) == 2
    assert targets.count(store.linear) == 1
    assert targets.count(aten.linear.default) == 1  # its weight is computed: autograd has to go on from it
