"""Grouped products on tensors without data."""

from __future__ import annotations

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from shardwise.predict.profile.meta_model import widen_grouped_products


def product(dtype: torch.dtype, inner: int = 8) -> torch.Tensor:
    rows, experts = torch.randn(16, 8).to(dtype), torch.randn(4, inner, 24).to(dtype)
    return torch.nn.functional.grouped_mm(rows, experts, offs=torch.tensor([4, 8, 12, 16], dtype=torch.int32))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_shapes_are_those_of_real_products(dtype: torch.dtype) -> None:
    widen_grouped_products()
    real = product(dtype)
    with FakeTensorMode():
        fake = product(dtype)
    assert (fake.shape, fake.dtype) == (real.shape, real.dtype)


def test_what_does_not_fit_is_refused_still() -> None:
    widen_grouped_products()
    with FakeTensorMode(), pytest.raises(RuntimeError, match="contraction"):
        product(torch.float32, inner=16)


def test_torch_alone_refuses_it() -> None:
    """Once it does not, `widen_grouped_products` can go."""
    refusing = next(
        cell.cell_contents
        for cell in torch._meta_registrations._meta_grouped_mm_common.__closure__ or ()
        if callable(cell.cell_contents)
    )
    with pytest.raises(RuntimeError, match="BF16"):
        refusing(torch.empty(16, 8, device="meta"), torch.empty(4, 8, 24, device="meta"), None, None)
