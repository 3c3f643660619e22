"""Codecs of gradients on the wire: rows of float32 or float64 to rows of bytes and back.

bf16    the upper half of a float32
int8    whole numbers of -127 to 127, times a scale for each block: its largest value over 127
fp8     float8_e4m3fn, times a scale for each block: its largest value over 448
sign    one bit, times the mean absolute value of each block (Karimireddy et al. 2019, EF-signSGD)
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from shardwise.splitting.compression import BLOCK

_FP8 = torch.float8_e4m3fn
_LEAST = 2.0**-100
"""Least scale of a block, in the place of 0 for a block of zeros."""


class Codec(Protocol):
    """Codec of gradients; rows are encoded each for itself."""

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes (uint8) of rows of values, whose length is a multiple of BLOCK."""
        ...

    def decode(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of rows of bytes."""
        ...


class HalfCodec:
    """Codec `bf16`."""

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes of rows of values of any length."""
        return values.to(torch.bfloat16).view(torch.uint8)

    def decode(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of rows of bytes."""
        return code.view(torch.bfloat16).to(dtype)


class ScaledCodec:
    """Codec with a float32 scale for each block. The scales of a row come first, then its elements."""

    def encode(self, values: Tensor) -> Tensor:
        """Return the bytes of rows of values."""
        blocks = values.view(len(values), -1, BLOCK)
        scales = self._scales(blocks).float().clamp(min=_LEAST)
        code = self._narrowed(blocks, scales)
        return torch.cat([scales.view(len(values), -1).view(torch.uint8), code.view(len(values), -1)], dim=1)

    def decode(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        """Return the values of rows of bytes."""
        rows, size = code.shape
        blocks = size // (4 + self._bytes)
        scales = code[:, : 4 * blocks].contiguous().view(torch.float32).view(rows, blocks, 1)
        wide = self._widened(code[:, 4 * blocks :].reshape(rows, blocks, self._bytes), dtype)
        return wide.mul_(scales).view(rows, -1)

    _bytes = BLOCK
    """Bytes of a block without its scale."""

    def _scales(self, blocks: Tensor) -> Tensor:
        raise NotImplementedError

    def _narrowed(self, blocks: Tensor, scales: Tensor) -> Tensor:
        raise NotImplementedError

    def _widened(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        raise NotImplementedError


class Int8Codec(ScaledCodec):
    """Codec `int8`."""

    def _scales(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(dim=2, keepdim=True).div_(127)

    def _narrowed(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return (blocks / scales).round_().clamp_(-127, 127).to(torch.int8).view(torch.uint8)

    def _widened(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        return code.view(torch.int8).to(dtype)


class Fp8Codec(ScaledCodec):
    """Codec `fp8`."""

    _largest = torch.finfo(_FP8).max

    def _scales(self, blocks: Tensor) -> Tensor:
        return blocks.abs().amax(dim=2, keepdim=True).div_(self._largest)

    def _narrowed(self, blocks: Tensor, scales: Tensor) -> Tensor:
        return (blocks / scales).clamp_(-self._largest, self._largest).float().to(_FP8).view(torch.uint8)

    def _widened(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        return code.view(_FP8).to(dtype)


class SignCodec(ScaledCodec):
    """Codec `sign`: eight elements in a byte, a set bit for one below zero."""

    _bytes = BLOCK // 8

    def _scales(self, blocks: Tensor) -> Tensor:
        return blocks.abs().mean(dim=2, keepdim=True)

    def _narrowed(self, blocks: Tensor, scales: Tensor) -> Tensor:
        below = (blocks < 0).view(*blocks.shape[:2], self._bytes, 8)
        return (below * _weights(blocks.device)).sum(dim=3, dtype=torch.uint8)

    def _widened(self, code: Tensor, dtype: torch.dtype) -> Tensor:
        below = (code.unsqueeze(3) & _weights(code.device)).ne(0).view(*code.shape[:2], BLOCK)
        return below.to(dtype).mul_(-2).add_(1)


def _weights(device: torch.device) -> Tensor:
    return 1 << torch.arange(8, dtype=torch.uint8, device=device)


CODECS: dict[str, Codec] = {"bf16": HalfCodec(), "int8": Int8Codec(), "fp8": Fp8Codec(), "sign": SignCodec()}
"""Codec of each kind of compression that sends every element."""
