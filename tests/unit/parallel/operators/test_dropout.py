"""Dropout depends on seed, step, site, sample and element, never on who computes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.parallel.engine import Position
from shardwise.parallel.operators.dropout import DropoutReplacements, attention_probabilities, draw_mask
from shardwise.parallel.operators.module_patches import ModulePatches

CPU = torch.device("cpu")


def run(function: Callable[..., Tensor], x: Tensor, samples: int, first: int = 0, **position: Any) -> Tensor:
    """`function(operations' dropout)` on samples `first` on of a global batch."""
    operators = DropoutReplacements(Position(first=first, samples=samples, counted=samples, **position))
    return function(operators, x)


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_share_of_dropped_elements_and_their_scale(p: float) -> None:
    mask = draw_mask(Position(seed=1, step=2), 3, torch.arange(20_000), 10, p)
    assert mask.dtype == torch.float32
    assert mask.unique().tolist() == [0.0, pytest.approx(1 / (1 - p))]  # type: ignore[no-untyped-call]
    dropped = (mask == 0).double()
    deviation = math.sqrt(p * (1 - p) / 20_000)
    assert (dropped.mean(1) - p).abs().max() < 4 * deviation
    # neighbours, samples, sites and steps are independent
    others = [
        dropped.roll(1, 1),
        dropped.roll(1, 0),
        (draw_mask(Position(seed=1, step=2), 4, torch.arange(20_000), 10, p) == 0).double(),
        (draw_mask(Position(seed=1, step=3), 3, torch.arange(20_000), 10, p) == 0).double(),
        (draw_mask(Position(seed=2, step=2), 3, torch.arange(20_000), 10, p) == 0).double(),
    ]
    for other in others:
        correlation = torch.corrcoef(torch.stack([dropped.flatten(), other.flatten()]))[0, 1]
        assert abs(correlation) < 4 / math.sqrt(200_000)


def test_extremes() -> None:
    index = torch.arange(100)
    assert bool((draw_mask(Position(), 0, index, 3, 0.0) == 1).all())
    assert bool((draw_mask(Position(), 0, index, 3, 1.0) == 0).all())
    with pytest.raises(ValueError, match="between 0 and 1"):
        DropoutReplacements(Position()).dropout(torch.ones(2), 1.5)


SHAPES = {
    "features": ((8, 5), 0),
    "tokens": ((8, 6, 4), 0),
    "sequence first": ((6, 8, 4), 1),
    "samples and heads in one": ((16, 6, 6), 0),
    "late": ((5, 7, 8), 2),
}


@pytest.mark.parametrize("name", SHAPES)
def test_cut_batches_drop_what_the_whole_drops(name: str) -> None:
    shape, dim = SHAPES[name]
    x = torch.randn(shape)
    whole = run(lambda operators, x: operators.dropout(x, 0.4), x, 8)
    unit = shape[dim] // 8
    for first, count in ((0, 3), (3, 2), (5, 3)):
        part = x.narrow(dim, first * unit, count * unit)
        cut = run(lambda operators, x: operators.dropout(x, 0.4), part, count, first)
        assert torch.equal(cut, whole.narrow(dim, first * unit, count * unit)), name


def test_one_sample_alone_drops_what_it_drops_in_the_batch() -> None:
    for shape, dim in SHAPES.values():
        if dim == 2:
            continue  # which dimension counts one sample cannot be told
        x = torch.randn(shape)
        whole = run(lambda operators, x: operators.dropout(x, 0.4), x, 8)
        unit = shape[dim] // 8
        alone = run(lambda operators, x: operators.dropout(x, 0.4), x.narrow(dim, 5 * unit, unit), 1, 5)
        assert torch.equal(alone, whole.narrow(dim, 5 * unit, unit)), shape


def test_tensor_of_no_sample_is_drawn_alike_everywhere() -> None:
    weight = torch.ones(7, 5)
    assert torch.equal(
        run(lambda operators, x: operators.dropout(x, 0.4), weight, 4, 0),
        run(lambda operators, x: operators.dropout(x, 0.4), weight, 3, 4),
    )


def test_sites_follow_the_calls_that_draw() -> None:
    operators = DropoutReplacements(Position(samples=4))
    x = torch.ones(4, 50)
    operators.dropout(x, 0.0)
    operators.dropout(x, 0.5, training=False)
    assert operators.site == 0
    first, second = operators.dropout(x, 0.5), operators.dropout(x, 0.5)
    assert operators.site == 2
    assert not torch.equal(first, second)


@pytest.mark.parametrize(
    ("module", "shape", "channels"),
    [
        (nn.Dropout1d(0.5), (4, 6, 5), 2),
        (nn.Dropout2d(0.5), (4, 6, 5, 3), 2),
        (nn.Dropout3d(0.5), (4, 6, 2, 3, 2), 2),
        (nn.FeatureAlphaDropout(0.5), (4, 6, 5), 2),
        (nn.Dropout(0.5), (4, 6, 5), 3),
        (nn.Dropout(0.5, inplace=True), (4, 6, 5), 3),
        (nn.AlphaDropout(0.5), (4, 6, 5), 3),
    ],
)
def test_modules(module: nn.Module, shape: tuple[int, ...], channels: int) -> None:
    """Whole channels go together; a module and its function draw the same; evaluation draws nothing."""
    model = nn.Sequential(module)
    operations = ModulePatches(Position(samples=4), CPU)
    operations.install(model)
    x = torch.ones(shape)
    with operations.training_pass():
        output = model(x.clone())
    flat = output.reshape(*shape[:channels], -1)
    assert torch.equal(flat, flat[..., :1].expand_as(flat))
    assert len(output.unique()) == 2
    with operations.training_pass():
        again = model(x.clone())
    assert torch.equal(output, again)
    model.eval()
    assert torch.equal(model(x), x)


def test_alpha_dropout_keeps_mean_and_variance() -> None:
    x = torch.randn(100, 4000)
    output = run(lambda operators, x: operators.handlers[F.alpha_dropout](x, 0.3, True), x, 100)
    assert output.mean().item() == pytest.approx(0, abs=0.02)
    assert output.std().item() == pytest.approx(1, abs=0.02)


class Functional(nn.Module):
    """Draws through functions, which no module of torch's own shows."""

    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.p, self.training)


def test_functions_are_caught_from_the_first_pass_on() -> None:
    model = Functional()
    operations = ModulePatches(Position(samples=4), CPU)
    operations.install(model)
    outputs = []
    for _ in range(3):
        with operations.training_pass():
            outputs.append(model(torch.ones(4, 30)))
    assert torch.equal(outputs[0], outputs[1])
    assert torch.equal(outputs[0], outputs[2])
    assert not operations.draws_other_random_numbers


def test_dropout_that_starts_later_is_caught_from_the_next_pass_on() -> None:
    model = Functional(0.0)
    operations = ModulePatches(Position(samples=4), CPU)
    operations.install(model)
    for _ in range(2):
        with operations.training_pass():
            model(torch.ones(4, 30))
    assert operations._everywhere == {"forward": False}
    model.p = 0.5
    outputs = []
    for _ in range(3):
        with operations.training_pass():
            outputs.append(model(torch.ones(4, 30)))
    assert torch.equal(outputs[1], outputs[2])
    assert operations._everywhere == {"forward": True}
    assert not operations.draws_other_random_numbers


def test_other_random_numbers_are_noticed() -> None:
    operations = ModulePatches(Position(samples=4), CPU)
    with operations.training_pass():
        torch.randperm(3)
    assert operations.draws_other_random_numbers


@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention(need_weights: bool, batch_first: bool) -> None:
    attention = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first)
    model = nn.ModuleList([attention])
    x = torch.randn(6, 3, 8)

    def output(samples: range) -> Tensor:
        position = Position(samples=len(samples), first=samples.start)
        operations = ModulePatches(position, CPU)
        fresh = nn.MultiheadAttention(8, 2, dropout=0.5, batch_first=batch_first)
        fresh.load_state_dict(attention.state_dict())
        operations.install(nn.ModuleList([fresh]))
        part = x[samples.start : samples.stop]
        part = part if batch_first else part.transpose(0, 1)
        with operations.training_pass():
            result = fresh(part, part, part, need_weights=need_weights)[0]
        assert operations._everywhere == {"forward": False}  # the module's own scope is enough
        output: Tensor = result if batch_first else result.transpose(0, 1)
        return output

    assert isinstance(model[0], nn.MultiheadAttention)
    whole = output(range(6))
    torch.testing.assert_close(torch.cat([output(range(4)), output(range(4, 6))]), whole)
    torch.testing.assert_close(output(range(6)), whole)


@pytest.mark.parametrize("options", [{}, {"is_causal": True}, {"scale": 0.3}, {"enable_gqa": True}])
def test_attention_probabilities_are_those_of_torch(options: dict[str, Any]) -> None:
    query = torch.randn(2, 4, 5, 8, dtype=torch.float64)
    heads = 2 if options.get("enable_gqa") else 4
    key, value = torch.randn(2, 2, heads, 5, 8, dtype=torch.float64)
    probabilities = attention_probabilities(
        query, key, None, options.get("is_causal", False), options.get("scale"), options.get("enable_gqa", False)
    )
    value_of_heads = value.repeat_interleave(4 // heads, 1)
    torch.testing.assert_close(
        probabilities @ value_of_heads, F.scaled_dot_product_attention(query, key, value, **options)
    )


def test_attention_dropout_keeps_the_mean_and_padding_is_no_nan() -> None:
    query, key, value = torch.randn(3, 4, 2, 5, 8)
    mask = torch.rand(4, 1, 5, 5) > 0.3
    mask[0, 0, 2] = False  # this query sees nothing
    query.requires_grad_(True)
    outputs = [
        DropoutReplacements(Position(samples=4, step=step)).attention(query, key, value, mask, 0.2)
        for step in range(3000)
    ]
    expected = F.scaled_dot_product_attention(query, key, value, mask)
    torch.testing.assert_close(torch.stack(outputs).mean(0), expected, atol=0.06, rtol=0)
    (gradient,) = torch.autograd.grad(outputs[0].sum(), query)
    assert bool(gradient.isfinite().all())


def test_attention_over_samples_does_not_fail() -> None:
    """Samples attend to each other: no dimension counts samples and heads together."""
    model = nn.ModuleList([nn.MultiheadAttention(8, 3 - 1, dropout=0.5)])
    operations = ModulePatches(Position(samples=5), CPU)
    operations.install(model)
    x = torch.randn(5, 8)
    with operations.training_pass():
        assert model[0](x, x, x)[0].shape == (5, 8)


def test_recomputation_draws_the_same() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 6)
            self.drop = nn.Dropout(0.5)

        def forward(self, x: Tensor) -> Tensor:
            return x + F.dropout(self.drop(torch.tanh(self.linear(x))), 0.3, self.training)

    def gradients(recompute: bool) -> list[Tensor]:
        torch.manual_seed(0)
        model = nn.Sequential(Block(), Block())
        operations = ModulePatches(Position(samples=4), CPU, recompute=recompute)
        operations.install(model)
        if recompute:
            for block in model:
                operations.recompute(block)
        found: list[Tensor] = []
        for _ in range(2):
            with operations.training_pass():
                output = model(torch.ones(4, 6))
            found += torch.autograd.grad(output.square().sum(), list(model.parameters()))
        return found

    for again, kept in zip(gradients(True), gradients(False), strict=True):
        torch.testing.assert_close(again, kept)
