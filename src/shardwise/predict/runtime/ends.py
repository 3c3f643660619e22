"""Work before the first block and after the last one: embedding, output, loss; and the update of parameters."""

from __future__ import annotations

from functools import lru_cache

from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.runtime.block import accumulation, moving, product
from shardwise.predict.runtime.sizes import Computation, Sizes

LOSS_BYTES = {"megatron": (38, 14), "eager": (16, 14), "fused": (6, 4)}
"""Bytes per logit, forward and backward. Megatron's loss casts (6), and takes maximum (4), difference (8), exponential
(8), sum (4) and quotient (8) in place as kernels of their own; back it multiplies (8) and casts (6). PyTorch's casts
and takes one log softmax that reads once what fits into a multiprocessor."""

UPDATE_BYTES = {"fp16": 56, "bf16": 44, "float32": 32, "tf32": 32}
"""Bytes per parameter that one step of Adam with float32 states moves: gradient, moments and master weight are read,
three of them written; low precision adds the copies of gradient and weight, fp16 the unscaling."""


@lru_cache(maxsize=4096)
def embedding(sizes: Sizes, how: Computation) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Forward and backward kernels of the embedding for one microbatch."""
    elements = how.tokens(sizes) * sizes.hidden
    mask = 3 if how.runtime.dropout else 2
    rows = sizes.vocab * sizes.hidden / how.tensor
    forward = [moving("embedding", how.dtype, elements, 2 * mask)]
    backward = [
        moving("embedding", how.dtype, elements, 6, backward=True),
        moving("embedding gradient", how.dtype, rows, 2 + 2 * how.runtime.accumulation_bytes, backward=True),
    ]
    return tuple(forward), tuple(backward)


@lru_cache(maxsize=4096)
def head(sizes: Sizes, how: Computation) -> tuple[tuple[Kernel, ...], tuple[Kernel, ...]]:
    """Forward and backward kernels of the last norm, the output and the loss for one microbatch."""
    t, columns, h = how.tokens(sizes), how.columns(sizes.vocab), sizes.hidden
    forward_bytes, backward_bytes = LOSS_BYTES[how.runtime.loss]
    logits = float(t) * columns
    forward = [
        moving("norm", how.dtype, t * h, 4),
        product("output", how.dtype, t, columns, h),
        moving("loss", how.dtype, logits, forward_bytes),
    ]
    backward = [
        moving("loss", how.dtype, logits, backward_bytes, backward=True),
        product("output inputs", how.dtype, t, h, columns, backward=True),
        product("output weights", how.dtype, columns, h, t, backward=True),
        *accumulation(how, columns * h),
        moving("norm", how.dtype, t * h, 8, backward=True),
    ]
    return tuple(forward), tuple(backward)


def update(parameters: float, how: Computation) -> Kernel:
    """Adam's update of so many parameters on one rank."""
    return moving("update", "float32", parameters, UPDATE_BYTES[how.dtype])
