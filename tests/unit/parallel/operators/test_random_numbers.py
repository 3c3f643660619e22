"""Random numbers that a model draws itself: their distributions, and that nobody's part of a batch changes them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.engine import Position
from shardwise.parallel.operators.dropout import DropoutReplacements
from shardwise.parallel.operators.random_numbers import replacements
from shardwise.parallel.tensor.compute_rules import KEYED

MANY = (64, 2000)
DRAWS: list[tuple[str, Callable[..., Any], tuple[Any, ...], dict[str, Any], float, float]] = [
    ("rand", torch.rand, MANY, {}, 1 / 2, 12**-0.5),
    ("randn", torch.randn, (MANY,), {}, 0, 1),
    ("randn", torch.randn, MANY, {"dtype": torch.float64}, 0, 1),
    ("rand_like", torch.rand_like, (torch.empty(MANY),), {}, 1 / 2, 12**-0.5),
    ("randn_like", torch.randn_like, (torch.empty(MANY),), {"dtype": torch.float64}, 0, 1),
    ("randint", torch.randint, (3, 7, MANY), {}, 4.5, 1.25**0.5),
    ("randint", torch.randint, (4,), {"size": MANY}, 1.5, 1.25**0.5),
    ("randint_like", torch.randint_like, (torch.empty(MANY), 4), {}, 1.5, 1.25**0.5),
    ("bernoulli", torch.bernoulli, (torch.full(MANY, 0.2),), {}, 0.2, 0.4),
    ("bernoulli_", Tensor.bernoulli_, (torch.empty(MANY), 0.2), {}, 0.2, 0.4),
    ("uniform_", Tensor.uniform_, (torch.empty(MANY),), {"from": -1, "to": 3}, 1, 4 * 12**-0.5),
    ("normal_", Tensor.normal_, (torch.empty(MANY), 2.0), {"std": 3.0}, 2, 3),
    ("exponential_", Tensor.exponential_, (torch.empty(MANY), 2.0), {}, 1 / 2, 1 / 2),
]


def drawing(**position: Any) -> tuple[DropoutReplacements, dict[Callable[..., Any], Callable[..., Any]]]:
    dropout = DropoutReplacements(Position(**position))
    return dropout, replacements(dropout)


def test_every_function_is_tried_here() -> None:
    assert {name for name, *_ in DRAWS} == set(KEYED)


@pytest.mark.parametrize(("name", "function", "args", "kwargs", "mean", "deviation"), DRAWS)
def test_shape_dtype_and_distribution_are_torchs(
    name: str, function: Any, args: Any, kwargs: Any, mean: float, deviation: float
) -> None:
    expected = function(*args, **kwargs)
    dropout, handlers = drawing(samples=64)
    drawn = handlers[function](*args, **kwargs)
    assert (drawn.shape, drawn.dtype, dropout.site) == (expected.shape, expected.dtype, 1)
    count = drawn.numel()
    assert float(drawn.double().mean()) == pytest.approx(mean, abs=5 * deviation / count**0.5)
    assert float(drawn.double().std()) == pytest.approx(deviation, rel=0.02)
    assert abs(float(drawn.double()[:, 1:].flatten() @ drawn.double()[:, :-1].flatten()) / count - mean**2) < 0.05


def test_uniform_numbers_stay_below_one_in_every_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        drawn = drawing(samples=64)[1][torch.rand](MANY, dtype=dtype)
        assert float(drawn.min()) >= 0
        assert float(drawn.max()) < 1


def test_half_a_batch_draws_what_the_whole_batch_draws_for_it() -> None:
    whole = drawing(samples=8, step=3)[1][torch.randn](8, 5)
    half = drawing(samples=4, first=4, step=3)[1][torch.randn](4, 5)
    assert torch.equal(whole[4:], half)
    assert not torch.equal(whole[:4], half)
    assert not torch.equal(whole, drawing(samples=8, step=4)[1][torch.randn](8, 5))


@pytest.mark.parametrize("hard", [False, True])
def test_gumbel_softmax_chooses_as_often_as_torchs(hard: bool) -> None:
    logits = torch.tensor([0.1, 0.6, 0.3]).log().repeat(20000, 1).requires_grad_()
    chosen = drawing(samples=20000)[1][F.gumbel_softmax](logits, tau=0.5, hard=hard)
    expected = F.gumbel_softmax(logits, tau=0.5, hard=hard)
    assert torch.allclose(chosen.mean(0), expected.mean(0), atol=0.02)
    chosen[:, 0].sum().backward()
    assert logits.grad is not None
    assert float(logits.grad.abs().sum()) > 0


def test_what_torch_must_draw_itself_is_left_to_it() -> None:
    dropout, handlers = drawing(samples=2)
    seeded = handlers[torch.rand](2, generator=torch.Generator().manual_seed(5))
    assert torch.equal(seeded, torch.rand(2, generator=torch.Generator().manual_seed(5)))
    through = torch.ones(2, requires_grad=True) * 1
    handlers[Tensor.normal_](through)
    assert dropout.site == 0
