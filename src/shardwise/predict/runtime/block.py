"""The kernels of one transformer block on one rank: forward, backward, and what is recomputed.

Per microbatch, with T tokens, hidden size h, tensor parallelism t (Shoeybi et al. 2019; Korthikanti et al. 2022):

    norm, [h x (q+2kv)/t] product, attention over heads/t, [h/t x h] product, residual,
    norm, [h x f/t] product, activation, [f/t x h] product, residual

The backward pass has two products for each (for inputs and for weights) and moves about twice as many bytes.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache

from shardwise.predict.hardware.gpu import ELEMENT_BYTES
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.runtime.sizes import Computation, Sizes


@dataclass(frozen=True, slots=True)
class Passes:
    """Kernels of one block for one microbatch, in order.

    Attributes:
        forward: of the forward pass.
        backward: of the backward pass.
        recomputed: run once more before the backward pass.
    """

    forward: tuple[Kernel, ...]
    backward: tuple[Kernel, ...]
    recomputed: tuple[Kernel, ...]


def product(
    name: str, dtype: str, m: int, n: int, k: int, *, batch: int = 1, output_bytes: float = 2, backward: bool = False
) -> Kernel:
    """A matrix product (m x k) @ (k x n), `batch` of them."""
    element = ELEMENT_BYTES[dtype]
    moved = batch * (element * (m * k + k * n) + output_bytes * m * n)
    return Kernel(name, "matmul", dtype, 2.0 * batch * m * n * k, moved, (batch, m, n, k), backward)


def moving(name: str, dtype: str, elements: float, bytes_per_element: float, *, backward: bool = False) -> Kernel:
    """A kernel that only moves and combines values."""
    return Kernel(name, "memory", dtype, elements, elements * bytes_per_element, (int(elements),), backward)


@lru_cache(maxsize=4096)
def block(sizes: Sizes, how: Computation) -> Passes:
    """The kernels of one block for one microbatch on one rank."""
    attention_in, attention_core, attention_out = _attention(sizes, how)
    mlp = _mlp(sizes, how)
    casts_forward, casts_backward = _casts(sizes, how)
    forward = (*attention_in, *attention_core, *attention_out, *mlp, *casts_forward)
    backward = (
        *_linear_backward(sizes, how),
        *_attention_backward(sizes, how),
        *_elementwise_backward(sizes, how),
        *casts_backward,
    )
    needed = (*attention_in, *attention_core, *attention_out, *mlp[:-2], *casts_forward)
    repeated = needed if how.runtime.stops_early else forward
    return Passes(forward, backward, _recomputed(sizes, how, repeated, attention_core))


def _residual_elements(sizes: Sizes, how: Computation) -> float:
    """Elements of the residual stream that one rank works on."""
    return how.tokens(sizes) * sizes.hidden / (how.tensor if how.sequence_parallel else 1)


def _attention(sizes: Sizes, how: Computation) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    t, h, tp, e = how.tokens(sizes), sizes.hidden, how.tensor, how.width
    residual, linear = _residual_elements(sizes, how), how.linear_dtype
    kind = how.runtime.elementwise
    before = [_norm(sizes, how, residual), product("qkv", linear, t, sizes.qkv // tp, h, output_bytes=e)]
    if kind == "megatron":
        before.append(moving("bias", how.dtype, t * sizes.qkv / tp, 2 * e))
    elif not sizes.learned_positions:
        rotated = t * (h + sizes.kv_heads * sizes.head_size) / tp
        before.append(moving("rotary", how.dtype, rotated, (8 if kind == "eager" else 2) * e))
    core = _core(sizes, how)
    after = [product("projection", linear, t, h, h // tp, output_bytes=e), _residual(how, residual)]
    return before, core, after


PASSES_OF_NORM = (2, 4)
"""Times that a fused norm reads or writes an element, forward and backward."""

PASSES_IN_PARTS = (16, 48)
"""Times for a root mean square norm of elementary operations in float32: to float32 and back (3 + 3 widths), square
(4), mean (2), times the root (4 of float32), times the weight (2); their gradients are some three times as much."""


def _norm(sizes: Sizes, how: Computation, elements: float, *, backward: bool = False) -> Kernel:
    passes = PASSES_OF_NORM if how.runtime.fused_norms or not sizes.gated else PASSES_IN_PARTS
    return moving("norm", how.dtype, elements, passes[backward] * how.width, backward=backward)


def _residual(how: Computation, elements: float) -> Kernel:
    mask = 1 if how.runtime.dropout else 0
    return moving("residual", how.dtype, elements, 3 * how.width + mask)


def _core(sizes: Sizes, how: Computation) -> list[Kernel]:
    """Attention itself, between its two linear layers."""
    t, tp, e, d = how.tokens(sizes), how.tensor, how.width, sizes.head_size
    heads, b = max(1, sizes.heads // tp), how.micro_batch
    if how.runtime.attention != "unfused":
        return [_flash(sizes, how, backward=False)]
    s = sizes.sequence
    scores = float(b * heads) * s * s
    kernels = [product("scores", how.dtype, s, s, d, batch=b * heads, output_bytes=e)]
    kernels += _softmax(how, b * heads, scores, backward=False)
    if how.runtime.dropout:
        kernels.append(moving("dropout", how.dtype, scores, 2 * e + 1))
    kernels.append(product("context", how.dtype, s, d, s, batch=b * heads, output_bytes=e))
    kernels.append(moving("transpose", how.dtype, t * sizes.hidden / tp, 2 * e))
    return kernels


Widths = tuple[tuple[float, ...], tuple[float, ...]]

FUSED_SOFTMAX: Widths = ((2.0,), (3.0,))
"""Widths of a score that the kernel reads and writes which scales, masks and takes the softmax; forward, backward."""

HALF_SOFTMAX: Widths = ((3.0, 4.0, 4.5, 4.0, 3.0), (3.0, 6.0, 4.5, 4.0, 3.0))
"""Times for a softmax of elementary operations in half precision: to float32, scaled, masked, softmax, back."""

FLOAT_SOFTMAX: Widths = ((2.25, 2.0), (3.0, 2.25))
"""Times for a softmax of elementary operations in float32: masked, softmax; their gradients."""

FUSED_SOFTMAX_GROUP = 4
"""Megatron-LM's kernel wants half precision, and a multiple of so many heads times samples
(`FusedScaleMaskSoftmax.is_kernel_available`)."""


def _softmax(how: Computation, batch: int, scores: float, *, backward: bool) -> list[Kernel]:
    """Return the kernels of the softmax of `batch` matrices of attention scores."""
    widths = FLOAT_SOFTMAX
    if how.width == 2:
        widths = HALF_SOFTMAX if batch % FUSED_SOFTMAX_GROUP else FUSED_SOFTMAX
    return [moving("softmax", how.dtype, scores, each * how.width, backward=backward) for each in widths[backward]]


def _flash(sizes: Sizes, how: Computation, *, backward: bool) -> Kernel:
    b, s, heads = how.micro_batch, sizes.sequence, max(1, sizes.heads // how.tensor)
    queries, d = s // how.context, sizes.head_size
    flops = 4.0 * b * heads * queries * s * d * (2.5 if backward else 1)
    moved = how.width * b * heads * d * (2 * queries + 2 * s) * (2 if backward else 1)
    name = "cudnn attention" if how.runtime.attention == "fused" else "flash attention"
    if not how.runtime.causal:
        name = f"dense {name}"
    return Kernel(name, "attention", how.dtype, flops, moved, (b, heads, queries, s, d), backward)


def _mlp(sizes: Sizes, how: Computation) -> list[Kernel]:
    t, h, tp, e = how.tokens(sizes), sizes.hidden, how.tensor, how.width
    residual, linear = _residual_elements(sizes, how), how.linear_dtype
    wide = t * sizes.ffn / tp
    passes = 3 if sizes.gated else 2
    if how.runtime.elementwise == "eager" and sizes.gated:
        passes = 5
    return [
        _norm(sizes, how, residual),
        product("up", linear, t, sizes.up // tp, h, output_bytes=e),
        moving("activation", how.dtype, wide, passes * e),
        product("down", linear, t, h, sizes.ffn // tp, output_bytes=e),
        _residual(how, residual),
    ]


def _linear_shapes(sizes: Sizes, how: Computation) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of the linear layers of a block on one rank."""
    tp, h = how.tensor, sizes.hidden
    return [
        ("qkv", h, sizes.qkv // tp),
        ("projection", h // tp, h),
        ("up", h, sizes.up // tp),
        ("down", sizes.ffn // tp, h),
    ]


def _linear_backward(sizes: Sizes, how: Computation) -> list[Kernel]:
    t, e, linear = how.tokens(sizes), how.width, how.linear_dtype
    kernels = []
    for name, inputs, outputs in _linear_shapes(sizes, how):
        kernels.append(product(f"{name} inputs", linear, t, inputs, outputs, output_bytes=e, backward=True))
        kernels.append(product(f"{name} weights", linear, outputs, inputs, t, output_bytes=e, backward=True))
    matrices = sum(inputs * outputs for _, inputs, outputs in _linear_shapes(sizes, how))
    return [*kernels, *accumulation(how, matrices)]


def accumulation(how: Computation, elements: float) -> list[Kernel]:
    """Adds gradients of weights to what earlier microbatches left; nothing where the products do that themselves."""
    if how.runtime.fused_accumulation:
        return []
    bytes_each = how.width + 2 * how.runtime.accumulation_bytes
    return [moving("accumulate", how.dtype, elements, bytes_each, backward=True)]


def _attention_backward(sizes: Sizes, how: Computation) -> list[Kernel]:
    e, tp, d, s = how.width, how.tensor, sizes.head_size, sizes.sequence
    if how.runtime.attention != "unfused":
        return [_flash(sizes, how, backward=True)]
    batch = how.micro_batch * max(1, sizes.heads // tp)
    scores = float(batch) * s * s
    dtype = how.dtype
    kernels = [
        product("context inputs", dtype, s, s, d, batch=batch, output_bytes=e, backward=True),
        product("context values", dtype, s, d, s, batch=batch, output_bytes=e, backward=True),
        *_softmax(how, batch, scores, backward=True),
        product("queries", dtype, s, d, s, batch=batch, output_bytes=e, backward=True),
        product("keys", dtype, s, d, s, batch=batch, output_bytes=e, backward=True),
        moving("transpose", dtype, how.tokens(sizes) * 4 * sizes.hidden / tp, 2 * e, backward=True),
    ]
    if how.runtime.dropout:
        kernels.insert(2, moving("dropout", dtype, scores, 2 * e + 1, backward=True))
    return kernels


def _elementwise_backward(sizes: Sizes, how: Computation) -> list[Kernel]:
    t, tp, e, dtype = how.tokens(sizes), how.tensor, how.width, how.dtype
    residual, wide = _residual_elements(sizes, how), t * sizes.ffn / tp
    kind = how.runtime.elementwise
    activation = 5 if sizes.gated else 3
    if kind == "eager" and sizes.gated:
        activation = 8
    kernels = [
        _norm(sizes, how, residual, backward=True),
        moving("residual", dtype, residual, 3 * e, backward=True),
        moving("activation", dtype, wide, activation * e, backward=True),
        _norm(sizes, how, residual, backward=True),
        moving("residual", dtype, residual, 3 * e, backward=True),
    ]
    if kind == "megatron" or sizes.biases:
        kernels.append(moving("bias", dtype, t * (sizes.qkv + sizes.up) / tp + 2 * residual, e, backward=True))
    if kind != "megatron" and not sizes.learned_positions:
        rotated = t * (sizes.hidden + sizes.kv_heads * sizes.head_size) / tp
        kernels.append(moving("rotary", dtype, rotated, (8 if kind == "eager" else 2) * e, backward=True))
    if how.runtime.dropout:
        kernels.append(moving("dropout", dtype, 2 * residual, 2 * e + 1, backward=True))
    return kernels


def _casts(sizes: Sizes, how: Computation) -> tuple[list[Kernel], list[Kernel]]:
    """Casts of activations and of gradients to fp8 or fp4, each in both layouts; none in other precisions."""
    if how.linear_dtype not in ("fp8", "fp4"):
        return [], []
    t = how.tokens(sizes)
    narrow = 2 * ELEMENT_BYTES[how.linear_dtype]
    reads = 2 * how.width if how.scaling == "current" else how.width
    inputs = t * sum(inputs for _, inputs, _ in _linear_shapes(sizes, how))
    outputs = t * sum(outputs for _, _, outputs in _linear_shapes(sizes, how))
    return (
        [moving("cast", how.dtype, inputs, reads + narrow)],
        [moving("cast", how.dtype, outputs, reads + narrow, backward=True)],
    )


def _recomputed(sizes: Sizes, how: Computation, whole: Sequence[Kernel], core: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Return the kernels of recomputation before a block's backward pass; `whole` are all that can be."""
    if how.recompute == "none":
        return ()
    if how.recompute == "selective":
        return tuple(core)
    if how.recompute == "operations":
        return (*(kernel for kernel in whole if kernel.kind == "memory"), *_every_second(sizes, how))
    return tuple(whole)


def _every_second(sizes: Sizes, how: Computation) -> tuple[Kernel, ...]:
    """Products that torchtitan's selective recomputation by operation computes again: every second one.

    Each linear layer has its own, and the last one's result is not needed.
    """
    return tuple(
        product("again", how.linear_dtype, how.tokens(sizes), outputs, inputs, output_bytes=how.width)
        for inputs, outputs in sizes.linears(how.tensor)[1:-1:2]
    )
