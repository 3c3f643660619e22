"""Block-wise 8-bit codes of float32 tensors: dynamic quantization (Dettmers et al. 2022, section 2.2).

    codes = codec.narrow(tensor)       1 byte per element, and 4 bytes for each block of 256 elements
    codec.widen(codes)                 float32 again; the largest element of each block is exact

Each block of elements that follow each other in memory is divided by its element of largest magnitude, and each
quotient is replaced by the nearest of 256 values: seven decades, each with twice as many values as the next smaller
one. A tensor without negative elements has all of its values at zero or above, and positive elements never become zero
in it: an optimizer that divides by the root of a second moment would make a huge update.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

BLOCK = 256
"""Elements with one scale."""

DECADES = 7

LEAST = 4096
"""Least elements of a tensor that is narrowed."""


class BlockCodes(NamedTuple):
    """A float32 tensor as codes.

    Attributes:
        codes: uint8, one per element in the order of memory, padded to whole blocks; blocks x BLOCK.
        scales: float32, the element of largest magnitude of each block with its sign; blocks x 1.
        signed: int32, 1 if an element is negative, else 0; one number, on the device, so that nobody waits for it.
        shape: shape of the tensor.
        stride: its strides; it is dense.
    """

    codes: Tensor
    scales: Tensor
    signed: Tensor
    shape: tuple[int, ...]
    stride: tuple[int, ...]

    def to(self, device: torch.device) -> BlockCodes:
        """Return the codes on a device."""
        return self._replace(codes=self.codes.to(device), scales=self.scales.to(device), signed=self.signed.to(device))


def values(*, signed: bool) -> list[float]:
    """Return the 256 values of codes in ascending order: from -1 to 1 if signed, else from 0 to 1."""
    found = [0.0, 1.0]
    for decade in range(DECADES):
        count = 2**decade if signed else 2 ** (decade + 1)
        means = [10.0 ** (decade - DECADES + 1) * (0.1 + 0.9 * (number + 0.5) / count) for number in range(count)]
        found += [*means, *(-mean for mean in means if signed)]
    return sorted(found)


def limits(*, signed: bool) -> list[float]:
    """Return the largest element of each code but the last: the middle between neighbours, and zero for zero alone."""
    found = values(signed=signed)
    middles = [(low + high) / 2 for low, high in pairwise(found)]
    return middles if signed else [0.0, *middles[1:]]


def is_dense(tensor: Tensor) -> bool:
    """Return whether the elements of a tensor fill a stretch of memory, in any order of its dimensions."""
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def can_narrow(value: Any, parameter: Tensor) -> bool:
    """Return whether a value of a parameter's state is one to narrow."""
    return (
        isinstance(value, Tensor)
        and value.shape == parameter.shape
        and value.dtype == torch.float32
        and value.layout == torch.strided
        and value.numel() >= LEAST
        and is_dense(value)
    )


class BlockCodec:
    """Conversion between float32 tensors and their codes; keeps the values of the codes on each device."""

    def __init__(self) -> None:
        self._tables: dict[torch.device, tuple[Tensor, Tensor]] = {}

    @torch.no_grad()
    def narrow(self, tensor: Tensor) -> BlockCodes:
        """Return the codes of a dense float32 tensor, whose memory is overwritten."""
        _, table = self._of(tensor.device)
        flat, missing = tensor.as_strided((tensor.numel(),), (1,)), -tensor.numel() % BLOCK
        blocks = (functional.pad(flat, (0, missing)) if missing else flat).view(-1, BLOCK)
        low, high = torch.aminmax(blocks, dim=1, keepdim=True)
        signed = (low.amin() < 0).to(torch.int32).view(1)
        scales = torch.where(-low > high, low, high)
        blocks.div_(torch.where(scales == 0, 1.0, scales))
        codes = torch.bucketize(blocks, table.index_select(0, signed).view(-1), out_int32=True)
        return BlockCodes(codes.to(torch.uint8), scales, signed, tuple(tensor.shape), tensor.stride())

    @torch.no_grad()
    def widen(self, codes: BlockCodes) -> Tensor:
        """Return the float32 tensor that codes stand for."""
        table, _ = self._of(codes.codes.device)
        chosen = table.index_select(0, codes.signed).view(-1)
        blocks = chosen.index_select(0, codes.codes.view(-1).to(torch.int32)).view(-1, BLOCK)
        return blocks.mul_(codes.scales).as_strided(codes.shape, codes.stride)

    def _of(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return values and limits of codes on a device, each of unsigned ones and of signed ones."""
        if device not in self._tables:
            both = [torch.tensor([f(signed=s) for s in (False, True)], device=device) for f in (values, limits)]
            self._tables[device] = both[0], both[1]
        return self._tables[device]
