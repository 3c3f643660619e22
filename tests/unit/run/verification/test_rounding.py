"""The tolerance of bfloat16 is that of its theory: roundings in a row, and their root mean square."""

from __future__ import annotations

import math

import pytest
import torch

from shardwise.run.verification.rounding import CONFIDENCE, ERROR, UNIT, roundings
from shardwise.strategy import Strategy


def test_the_error_of_one_rounding() -> None:
    """Numbers whose logarithms are uniform."""
    numbers = torch.exp2(torch.rand(1_000_000, generator=torch.Generator().manual_seed(0)).double())
    errors = (numbers.bfloat16().double() - numbers) / numbers
    assert float(errors.abs().max()) <= UNIT
    assert float(errors.square().mean().sqrt()) == pytest.approx(ERROR * UNIT, rel=0.02)


@pytest.mark.parametrize("count", [10, 100, 1000])
def test_errors_of_roundings_in_a_row(count: int) -> None:
    """The norm of what two runs differ by is what is expected, and within the tolerance."""
    draw = torch.Generator().manual_seed(count)
    exact = torch.randn(4096, generator=draw).double()
    runs = [exact.bfloat16(), exact.bfloat16()]
    for _ in range(count):
        factors = torch.rand(4096, generator=draw).double() + 0.5
        exact = exact * factors
        jitter = (1 + UNIT * torch.rand(4096, generator=draw).double() / 1000 for _ in runs)
        runs = [(run.double() * factors * each).bfloat16() for run, each in zip(runs, jitter, strict=True)]
    for run in runs:
        error = float(((run.double() - exact) / exact).square().mean().sqrt())
        assert error == pytest.approx(ERROR * UNIT * math.sqrt(count + 1), rel=0.2)
        assert error < CONFIDENCE * ERROR * UNIT * math.sqrt(2 * count)


def test_sums_in_bfloat16_add_roundings() -> None:
    assert roundings(Strategy(), 10) == roundings(Strategy.parse("fsdp=4,pp=2"), 10) == 60
    assert roundings(Strategy.parse("tp=4"), 10) == 100
    assert roundings(Strategy.parse("dp=4,reduce=bf16"), 10) == 64
