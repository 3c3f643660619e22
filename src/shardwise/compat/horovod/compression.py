"""Compression of gradients on their way between ranks."""

from __future__ import annotations

import torch
from torch import Tensor


class Compressor:
    """Interface of a compression: `compress` before a collective, `decompress` after it."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Return the tensor to send, and what `decompress` needs."""
        return tensor, None

    @staticmethod
    def decompress(tensor: Tensor, ctx: torch.dtype | None) -> Tensor:
        """Return the received tensor as it was before `compress`."""
        return tensor if ctx is None else tensor.to(ctx)


class HalfCompressor(Compressor):
    """Compression that sends floats of more than 16 bits as float16."""

    @staticmethod
    def compress(tensor: Tensor) -> tuple[Tensor, torch.dtype | None]:
        """Return the tensor in float16, and its dtype."""
        if not tensor.dtype.is_floating_point or tensor.dtype == torch.float16:
            return tensor, None
        return tensor.to(torch.float16), tensor.dtype


class Compressions:
    """Known compressions: `none` and `fp16`."""

    none = Compressor
    fp16 = HalfCompressor
