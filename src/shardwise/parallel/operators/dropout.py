"""Dropout that does not depend on which worker computes it.

The random bits of an element depend on the seed, the step, the call in the model (the site), the index of the sample in
the global batch and the index of the element within its sample. They come from a counter-based hash, not from a
generator with state. One process and any number of replicas therefore drop the same elements, the shards of a tensor
agree, and recomputation in the backward pass draws the same mask again.

Sites are numbered by the drawing calls (p above 0, in training) in the order of one forward pass; attention with
dropout on its probabilities is one site. The index of an element is its flat (row-major) index within its sample.

The hash is murmur3's finaliser (Appleby 2011) in wrapping int32 arithmetic, which is fast on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.engine import Position

_WORD = 0xFFFFFFFF
_FIRST, _SECOND = 0x85EBCA6B - (1 << 32), 0xC2B2AE35 - (1 << 32)
"""The two multipliers of murmur3's 32-bit finaliser, as signed integers."""


def draw_mask(
    position: Position, site: int, index: Tensor, samples: int, p: float, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Draw the factors of dropout: 0 with probability `p`, else 1 / (1 - p).

    Args:
        position: seed, step, turn and the index of the first sample in the global batch.
        site: index of the drawing call in the model's forward pass.
        index: integer tensor with the index of each element within its sample, on the device of the result.
        samples: size of the result's first dimension; sample n is number `position.first + n` of the global batch.
        p: probability of dropping an element, 0 to 1.
        dtype: dtype of the result.

    Returns:
        the factors, shape (samples, *index.shape).
    """
    if p >= 1:
        return torch.zeros((samples, *index.shape), dtype=dtype, device=index.device)
    survives = draw_bits(position, site, index, samples) >= min(round(p * 2**32), _WORD) - 2**31
    return survives.to(dtype).mul_(1.0 / (1.0 - p))


def draw_bits(position: Position, site: int, index: Tensor, samples: int) -> Tensor:
    """Draw 32 random bits for each element, as int32; arguments as for `draw_mask`.

    Returns:
        the bits, shape (samples, *index.shape).
    """
    turn = (position.turn,) if position.turn else ()
    low, high = _key(position.seed, position.step, site, *turn)
    places = torch.arange(position.first, position.first + samples, device=index.device)
    of_samples = _mix(_mix(places.to(torch.int32) ^ _signed(high)) + _signed(low))
    of_elements = _mix(_mix(index.to(torch.int32) ^ _signed(low)) + _signed(high))
    bits = of_samples.view(samples, *(1,) * index.dim()) ^ of_elements
    return bits.mul_(_FIRST).bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_SECOND)


def mask(
    position: Position,
    site: int,
    shape: torch.Size,
    p: float,
    like: Tensor,
    *,
    merged: bool = False,
    along: int | None = None,
    cut: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Draw the factors of dropout for a tensor of `shape`, or for the part of it that lies here; see `draw_mask`.

    Args:
        position: as for `draw_mask`; it also holds the tensor's number of samples.
        site: as for `draw_mask`.
        shape: shape of the whole tensor.
        p: as for `draw_mask`.
        like: a tensor with the dtype and device of the result.
        merged: whether the first dimension is samples times heads.
        along: the dimension of which only a part lies here. None if the whole tensor does.
        cut: (tensor, dimension) -> its part here; goes with `along`.
    """

    def draw(position: Position, site: int, index: Tensor, samples: int) -> Tensor:
        return draw_mask(position, site, index, samples, p, like.dtype)

    return by_sample(draw, position, site, shape, like.device, merged=merged, along=along, cut=cut)


def by_sample(
    draw: Callable[[Position, int, Tensor, int], Tensor],
    position: Position,
    site: int,
    shape: torch.Size,
    device: torch.device,
    *,
    merged: bool = False,
    along: int | None = None,
    cut: Callable[[Tensor, int], Tensor] | None = None,
) -> Tensor:
    """Call `draw` (arguments as for `draw_bits`) for a tensor of `shape`, or a part of it; see `mask`."""
    samples = position.samples
    dim = 0 if merged and shape[0] % samples == 0 else _sample_dim(shape, samples)
    if along is not None and along == dim:
        assert cut is not None
        return cut(by_sample(draw, position, site, shape, device, merged=merged), along)
    index = _indices(_within_sample(shape, dim, samples), device)
    if along is not None and cut is not None:
        index = cut(index, along - (dim is not None and 0 < dim < along))
    if dim is None:
        common = Position(seed=position.seed, step=position.step, turn=position.turn)
        return draw(common, site, index, 1)[0]
    drawn = draw(position, site, index, samples)
    return drawn.flatten(0, 1) if dim == 0 else drawn.movedim(0, dim)


def _mix(bits: Tensor) -> Tensor:
    """Apply murmur3's finaliser, a bijection of the 32-bit integers. Overwrites `bits`.

    Masking the result of an arithmetic shift makes the shift a logical one.
    """
    bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF)).mul_(_FIRST)
    bits.bitwise_xor_((bits >> 13).bitwise_and_(0x7FFFF)).mul_(_SECOND)
    return bits.bitwise_xor_((bits >> 16).bitwise_and_(0xFFFF))


def _key(*numbers: int) -> tuple[int, int]:
    """Hash integers to two 32-bit keys with the steps of splitmix64 (Steele et al. 2014)."""
    state = 0
    for number in numbers:
        state = (state ^ number) + 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
        state = (state ^ state >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
        state ^= state >> 31
    return state & _WORD, state >> 32


def _signed(word: int) -> int:
    return word - (1 << 32) if word >= 1 << 31 else word


class DropoutReplacements:
    """Replacements for the functions that draw dropout in a forward pass. `handlers` maps torch's function to ours.

    The sample dimension of a tensor is found by its size: the first dimension if it fits; the second (sequences first);
    the first again if it is a multiple (samples and heads or tokens in one dimension); any other that fits. A tensor
    with none of these belongs to no sample (a weight, say), and all workers draw it alike. If two dimensions happen to
    have that size, the wrong one may be taken. Dropout is then still valid, but differs from that of one process.

    Attributes:
        position: the position in the training; the engine keeps it up to date.
        site: index of the next drawing call; the engine sets it to 0 before every forward pass.
    """

    def __init__(self, position: Position, site: int = 0) -> None:
        self.position = position
        self.site = site
        self._many_heads = _with_globals(F.multi_head_attention_forward, self._globals())
        self.handlers: dict[Callable[..., Any], Callable[..., Any]] = {
            F.dropout: self.dropout,
            torch.dropout: self._native,
            torch.dropout_: self._native_,
            F.dropout1d: self._features(1),
            F.dropout2d: self._features(2),
            F.dropout3d: self._features(3),
            F.alpha_dropout: self._alpha,
            F.feature_alpha_dropout: self._feature_alpha,
            F.scaled_dot_product_attention: self.attention,
            F.multi_head_attention_forward: self._many_heads,
        }

    def mask(self, shape: torch.Size, p: float, like: Tensor, *, merged: bool = False) -> Tensor:
        """Draw the next site's factors for a tensor of `shape`, and advance `site`."""
        site, self.site = self.site, self.site + 1
        return mask(self.position, site, shape, p, like, merged=merged)

    def dropout(self, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
        """Compute `torch.nn.functional.dropout` with keyed factors."""
        return self._drop(input, p, training, inplace, input.shape)

    def _drop(
        self, x: Tensor, p: float, training: bool, inplace: bool, shape: torch.Size, *, merged: bool = False
    ) -> Tensor:
        _check(p)
        if not training or p == 0:
            return x
        mask = self.mask(shape, p, x, merged=merged)
        mask = mask.view(*shape, *(1,) * (x.dim() - len(shape)))
        return x.mul_(mask) if inplace else x * mask

    def _native(self, input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002
        return self.dropout(input, p, train)

    def _native_(self, input: Tensor, p: float, train: bool) -> Tensor:  # noqa: A002
        return self.dropout(input, p, train, inplace=True)

    def _features(self, dims: int) -> Callable[..., Tensor]:
        """Build dropout1d, 2d or 3d, which drops whole channels of `dims` dimensions."""

        def drop(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
            # (samples, channels, ...); torch's dropout1d and 3d also take one sample without its dimension
            lead = 1 if input.dim() == dims + 1 and dims != 2 else 2
            return self._drop(input, p, training, inplace, input.shape[:lead])

        return drop

    def _alpha(self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:  # noqa: A002
        return self._drop_alpha(input, p, training, inplace, input.shape)

    def _feature_alpha(self, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False) -> Tensor:  # noqa: A002
        return self._drop_alpha(input, p, training, inplace, input.shape[:2])

    def _drop_alpha(self, x: Tensor, p: float, training: bool, inplace: bool, shape: torch.Size) -> Tensor:
        """Apply alpha dropout, which keeps the mean and variance of self-normalising networks (Klambauer et al. 2017).

        The formula is torch's.
        """
        _check(p)
        if not training or p == 0:
            return x
        alpha = 1.7580993408473766
        scale = 0.0 if p == 1 else 1 / math.sqrt((alpha * alpha * p + 1) * (1 - p))
        survives = (self.mask(shape, p, x) > 0).to(x.dtype).view(*shape, *(1,) * (x.dim() - len(shape)))
        shift = (survives - 1) * (alpha * scale) + alpha * scale * p
        return x.mul_(survives * scale).add_(shift) if inplace else x * (survives * scale) + shift

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        """Compute `scaled_dot_product_attention`.

        Uses plain matmuls if there is dropout, because fused kernels draw their own masks.
        """
        if dropout_p == 0:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa
            )
        probabilities = attention_probabilities(query, key, attn_mask, is_causal, scale, enable_gqa)
        mask = self.mask(probabilities.shape, dropout_p, probabilities)
        if enable_gqa:
            value = value.repeat_interleave(query.size(-3) // value.size(-3), -3)
        return (probabilities * mask).to(value.dtype) @ value

    def _globals(self) -> dict[str, Any]:
        def dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:  # noqa: A002
            # here torch has samples and heads in one dimension, whatever the sizes are
            return self._drop(input, p, training, inplace, input.shape, merged=True)

        return {
            "dropout": dropout,
            "scaled_dot_product_attention": self.attention,
            "has_torch_function": lambda _: False,
        }


def attention_probabilities(
    query: Tensor, key: Tensor, mask: Tensor | None, causal: bool, scale: float | None, grouped: bool
) -> Tensor:
    """Compute softmax(q k^T * scale + mask), shape (..., queries, keys), as torch documents it.

    `scale` None is 1/sqrt(size of a head). With `causal`, query n attends to the keys up to n. With `grouped`, several
    query heads share a key head. A query that may attend to no key at all (padding) has probabilities of zero, as in
    torch's own attention.
    """
    if grouped:
        key = key.repeat_interleave(query.size(-3) // key.size(-3), -3)
    factor = 1 / math.sqrt(query.size(-1)) if scale is None else scale
    scores = (query * factor) @ key.transpose(-2, -1)
    if causal:
        allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=query.device).tril()
        scores = scores.masked_fill(~allowed, -math.inf)
    if mask is None:
        return torch.softmax(scores, -1)
    scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    probabilities: Tensor = torch._safe_softmax(scores, -1)
    return probabilities


def _sample_dim(shape: torch.Size, samples: int) -> int | None:
    """Return the dimension that counts the samples. Returns None if there is none.

    The first dimension counts them also if its size is a multiple of `samples`.
    """
    if not shape:
        return None
    if shape[0] == samples:
        return 0
    # samples == 1 fits every dimension: then the whole tensor belongs to the one sample
    if len(shape) > 2 and samples > 1 and shape[1] == samples:
        return 1
    if shape[0] % samples == 0 and shape[0]:
        return 0
    return next((dim for dim, size in enumerate(shape) if size == samples), None)


def _within_sample(shape: torch.Size, dim: int | None, samples: int) -> tuple[int, ...]:
    """Return the shape of one sample's elements, if dimension `dim` counts the samples or a multiple of them."""
    if dim is None:
        return shape
    if dim == 0:
        return (shape[0] // samples, *shape[1:])
    return (*shape[:dim], *shape[dim + 1 :])


def _indices(shape: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.arange(math.prod(shape), dtype=torch.int32, device=device).view(shape)


def _check(p: float) -> None:
    if not 0 <= p <= 1:
        raise ValueError(f"dropout probability has to be between 0 and 1, but got {p}")


def _with_globals(function: Any, replaced: dict[str, Any]) -> Any:
    """Copy a Python function with some of its global names replaced by other functions."""
    copy = FunctionType(
        function.__code__,
        {**function.__globals__, **replaced},
        function.__name__,
        function.__defaults__,
        function.__closure__,
    )
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
