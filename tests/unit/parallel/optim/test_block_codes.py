"""8-bit codes of a tensor are off by half a step of their values at most, whatever the tensor's shape."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from shardwise.parallel.optim.block_codes import BLOCK, BlockCodec, is_dense, values

HALF_STEP = {True: 0.9 / 64 / 2, False: 0.9 / 128 / 2}
"""Half of the largest step between values, relative to the largest element of a block, by whether codes are signed."""


def random(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


TENSORS = {
    "signed": random(64, 256),
    "square": random(64, 256).square(),
    "negative": -random(64, 256).square(),
    "wide": random(64, 256) * torch.logspace(-6, 6, 256),
    "a part of a block": random(67, 77),
    "transposed": random(67, 77).t(),
    "channels last": random(4, 3, 20, 20).to(memory_format=torch.channels_last),
}


def coded(tensor: Tensor) -> Tensor:
    codec = BlockCodec()
    return codec.widen(codec.narrow(tensor.clone()))


def blocks(tensor: Tensor) -> Tensor:
    """Whole blocks in the order of memory."""
    flat = tensor.as_strided((tensor.numel(),), (1,))
    return flat[: len(flat) // BLOCK * BLOCK].view(-1, BLOCK)


@pytest.mark.parametrize("signed", [True, False])
def test_values_are_those_of_the_paper(signed: bool) -> None:
    found = values(signed=signed)
    assert len(set(found)) == 256
    assert found == sorted(found)
    assert (found[0] == 0) != signed
    steps = [high - low for low, high in pairwise(found)]
    assert max(steps) / 2 == pytest.approx(HALF_STEP[signed])


@pytest.mark.parametrize("name", TENSORS)
def test_each_element_is_off_by_half_a_step(name: str) -> None:
    tensor = TENSORS[name].clone()
    found = coded(tensor)
    assert found.stride() == tensor.stride()
    expected, wide = blocks(tensor), blocks(found)
    largest = expected.abs().amax(1, keepdim=True)
    bound = HALF_STEP[bool((tensor < 0).any())]
    assert ((wide - expected).abs() <= 1.0001 * bound * largest).all()
    assert 0.002 < (found - tensor).norm() / tensor.norm() < 0.02  # of independent errors, far below the bound


@pytest.mark.parametrize("name", TENSORS)
def test_codes_of_what_codes_stand_for_are_the_same(name: str) -> None:
    """States that are widened and narrowed in every step drift by the updates alone."""
    once = coded(TENSORS[name])
    assert torch.equal(coded(once), once)
    largest = blocks(TENSORS[name].clone()).abs().amax(1)
    assert torch.equal(blocks(once).abs().amax(1), largest)


def test_positive_elements_never_become_zero() -> None:
    squares = torch.logspace(-30, 0, 8192).view(BLOCK, -1).t().contiguous()  # all sizes in each block
    found = coded(squares)
    assert (found > 0).all()
    assert (coded(squares.where(squares > 1e-3, 0))[squares <= 1e-3] == 0).all()


def test_zeros_stay_zeros_and_what_is_not_finite_is_seen() -> None:
    assert torch.equal(coded(torch.zeros(64, 64)), torch.zeros(64, 64))
    for broken in (torch.nan, torch.inf):
        tensor = random(64, 64)
        tensor[3, 5] = broken
        assert not coded(tensor)[3, 5].isfinite()


def test_bytes_of_codes() -> None:
    codes = BlockCodec().narrow(random(64, 256))
    assert codes.codes.nbytes + codes.scales.nbytes == 64 * 256 * (1 + 4 / BLOCK)


def test_what_is_not_dense() -> None:
    assert is_dense(random(8, 6).t())
    assert not is_dense(random(8, 6)[:, ::2])
    assert not is_dense(random(8, 1).expand(8, 6))
