"""One worker's plain module: tensors that a loss trains besides the model are found."""

from __future__ import annotations

import torch
from torch import nn

from shardwise.run.training.result import NO_STEP, FirstStep
from shardwise.run.verification.alone import _leaves


def test_all_leaves_that_a_gradient_reaches_are_found_once() -> None:
    layer, bias = nn.Linear(3, 2), torch.zeros(2, requires_grad=True)
    frozen = torch.ones(2)
    output = layer(torch.ones(1, 3)) + bias + frozen
    found = [id(leaf) for leaf in _leaves((output * output).sum())]
    assert sorted(found) == sorted(id(tensor) for tensor in (layer.weight, layer.bias, bias))


def test_a_loss_that_trains_nothing_has_no_leaves() -> None:
    assert list(_leaves(torch.ones(()))) == []


def test_a_proof_is_one_line() -> None:
    proved = FirstStep(True, 3.2e-8, 2.4e-7, 0.4)
    assert str(proved) == "first step equals one process: loss 3e-08, gradients 2e-07"
    assert str(NO_STEP) == "first step not proved: no step was left to take"
