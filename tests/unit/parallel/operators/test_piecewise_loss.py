"""A loss in pieces of the tokens is torch's cross entropy of a linear layer, with its gradients."""

from __future__ import annotations

import math
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.engine import Position
from shardwise.parallel.operators import piecewise_loss
from shardwise.parallel.operators.graph_operators import GraphOperators
from shardwise.parallel.tensor.communication import Exchange

WORDS, FEATURES, TOKENS = 11, 6, 10
REDUCTIONS = {"mean": 1, "sum": 2}


def operators() -> GraphOperators:
    return GraphOperators(Position(), Exchange(None, 0, 1), None)


def given(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Inputs (2, 5, features), weight, bias and targets of two samples."""
    generator = torch.Generator().manual_seed(1)
    shapes = (2, TOKENS // 2, FEATURES), (WORDS, FEATURES), (WORDS,)
    x, weight, bias = (
        torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes
    )
    return x, weight, bias, torch.randint(0, WORDS, (2, TOKENS // 2), generator=generator)


def whole(
    x: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, reduction: str, ignore: int, smoothing: float
) -> Tensor:
    logits = F.linear(x, weight, bias).flatten(0, -2)
    return F.cross_entropy(
        logits, target.flatten(), reduction=reduction, ignore_index=ignore, label_smoothing=smoothing
    )


def in_pieces(
    pieces: int,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    reduction: str = "mean",
    ignore: int = -100,
    smoothing: float = 0.0,
) -> Tensor:
    options = REDUCTIONS[reduction], ignore, smoothing
    return operators().loss_in_pieces(pieces, (x, weight, bias), target, (), options, torch.float64)


@pytest.mark.parametrize("pieces", [2, 3, 10])
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize(("ignore", "smoothing"), [(-100, 0.0), (3, 0.0), (3, 0.2)])
def test_loss_and_gradients(pieces: int, reduction: str, ignore: int, smoothing: float) -> None:
    x, weight, bias, target = given()
    target[0, :3] = 3  # the first piece of three or more has ignored targets only
    expected = whole(x, weight, bias, target, reduction, ignore, smoothing)
    found = in_pieces(pieces, x, weight, bias, target, reduction, ignore, smoothing)
    torch.testing.assert_close(found, expected)
    wanted = torch.autograd.grad(expected * 3, (x, weight, bias))
    for gradient, other in zip(torch.autograd.grad(found * 3, (x, weight, bias)), wanted, strict=True):
        torch.testing.assert_close(gradient, other)


def test_only_wanted_gradients_are_computed() -> None:
    x, weight, _, target = given()
    found = in_pieces(4, x, weight.detach(), None, target)
    torch.testing.assert_close(
        torch.autograd.grad(found, x), torch.autograd.grad(whole(x, weight, None, target, "mean", -100, 0.0), x)
    )
    with mock.patch.object(piecewise_loss, "_plus_product", side_effect=AssertionError):
        in_pieces(4, x, weight.detach(), None, target).backward()  # type: ignore[no-untyped-call]
        with torch.no_grad():
            in_pieces(4, x, weight, None, target)


def test_the_weight_adds_up_in_float32() -> None:
    x, weight, bias, target = given(torch.bfloat16)
    sums = []
    plus = piecewise_loss._plus_product

    def noted(*arguments: object) -> Tensor:
        sums.append(plus(*arguments))  # type: ignore[arg-type]
        return sums[-1]

    with mock.patch.object(piecewise_loss, "_plus_product", noted):
        found = in_pieces(5, x, weight, bias, target)
    assert {each.dtype for each in sums} == {torch.float32}
    found.backward()  # type: ignore[no-untyped-call]
    exact = given()
    whole(*exact, "mean", -100, 0.0).backward()  # type: ignore[no-untyped-call]
    for narrow, wide in zip((x, weight, bias), exact, strict=False):
        assert narrow.grad is not None
        assert wide.grad is not None
        assert narrow.grad.dtype == torch.bfloat16
        assert float((narrow.grad - wide.grad).norm() / wide.grad.norm()) < 2**-7


def test_targets_that_are_all_ignored_or_no_class_are_as_in_torch() -> None:
    x, weight, _, target = given()
    found = in_pieces(2, x, weight, None, torch.full_like(target, -100))
    assert math.isnan(found.item())
    for wrong in (WORDS, -1):
        with pytest.raises(RuntimeError, match="out of bounds"):
            in_pieces(2, x, weight, None, torch.full_like(target, wrong))


def test_one_piece_of_the_logits_exists_at_a_time() -> None:
    x, weight, bias, target = given()
    sizes: list[int] = []
    linear = F.linear

    def noted(*arguments: Tensor) -> Tensor:
        sizes.append(linear(*arguments).shape[0])
        return linear(*arguments)

    with mock.patch.object(F, "linear", noted):
        in_pieces(4, x, weight, bias, target)
    assert sizes == [3, 3, 3, 1]
