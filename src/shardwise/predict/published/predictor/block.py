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
from shardwise.predict.published.predictor.sizes import Setup, Sizes


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
def block(sizes: Sizes, setup: Setup) -> Passes:
    """The kernels of one block for one microbatch on one rank."""
    attention_in, attention_core, attention_out = _attention(sizes, setup)
    mlp = _mlp(sizes, setup)
    casts_forward, casts_backward = _casts(sizes, setup)
    forward = (*attention_in, *attention_core, *attention_out, *mlp, *casts_forward)
    backward = (
        *_linear_backward(sizes, setup),
        *_attention_backward(sizes, setup),
        *_elementwise_backward(sizes, setup),
        *casts_backward,
    )
    needed = (*attention_in, *attention_core, *attention_out, *mlp[:-2], *casts_forward)
    repeated = needed if setup.stack.stops_early else forward
    return Passes(forward, backward, _recomputed(sizes, setup, repeated, attention_core))


def tokens(sizes: Sizes, setup: Setup) -> int:
    """Tokens of a microbatch on one rank of context parallelism."""
    return setup.micro_batch * sizes.sequence // setup.context


def _width(setup: Setup) -> float:
    return ELEMENT_BYTES[setup.dtype]


def _residual_elements(sizes: Sizes, setup: Setup) -> float:
    """Elements of the residual stream that one rank works on."""
    return tokens(sizes, setup) * sizes.hidden / (setup.tensor if setup.sequence_parallel else 1)


def _attention(sizes: Sizes, setup: Setup) -> tuple[list[Kernel], list[Kernel], list[Kernel]]:
    t, h, tp, e = tokens(sizes, setup), sizes.hidden, setup.tensor, _width(setup)
    residual, linear = _residual_elements(sizes, setup), setup.linear_dtype
    kind = setup.stack.elementwise
    before = [_norm(sizes, setup, residual), product("qkv", linear, t, sizes.qkv // tp, h, output_bytes=e)]
    if kind == "megatron":
        before.append(moving("bias", setup.dtype, t * sizes.qkv / tp, 2 * e))
    elif not sizes.learned_positions:
        rotated = t * (h + sizes.kv_heads * sizes.head_size) / tp
        before.append(moving("rotary", setup.dtype, rotated, (8 if kind == "eager" else 2) * e))
    core = _core(sizes, setup)
    after = [product("projection", linear, t, h, h // tp, output_bytes=e), _residual(setup, residual)]
    return before, core, after


PASSES_OF_NORM = (2, 4)
"""Times that a fused norm reads or writes an element, forward and backward."""

PASSES_IN_PARTS = (16, 48)
"""Times for a root mean square norm of elementary operations in float32: to float32 and back (3 + 3 widths), square
(4), mean (2), times the root (4 of float32), times the weight (2); their gradients are some three times as much."""


def _norm(sizes: Sizes, setup: Setup, elements: float, *, backward: bool = False) -> Kernel:
    passes = PASSES_OF_NORM if setup.stack.fused_norms or not sizes.gated else PASSES_IN_PARTS
    return moving("norm", setup.dtype, elements, passes[backward] * _width(setup), backward=backward)


def _residual(setup: Setup, elements: float) -> Kernel:
    mask = 1 if setup.stack.dropout else 0
    return moving("residual", setup.dtype, elements, 3 * _width(setup) + mask)


def _core(sizes: Sizes, setup: Setup) -> list[Kernel]:
    """Attention itself, between its two linear layers."""
    t, tp, e, d = tokens(sizes, setup), setup.tensor, _width(setup), sizes.head_size
    heads, b = max(1, sizes.heads // tp), setup.micro_batch
    if setup.stack.attention != "unfused":
        return [_flash(sizes, setup, backward=False)]
    s = sizes.sequence
    scores = float(b * heads) * s * s
    kernels = [product("scores", setup.dtype, s, s, d, batch=b * heads, output_bytes=e)]
    kernels += _softmax(setup, b * heads, scores, backward=False)
    if setup.stack.dropout:
        kernels.append(moving("dropout", setup.dtype, scores, 2 * e + 1))
    kernels.append(product("context", setup.dtype, s, d, s, batch=b * heads, output_bytes=e))
    kernels.append(moving("transpose", setup.dtype, t * sizes.hidden / tp, 2 * e))
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


def _softmax(setup: Setup, batch: int, scores: float, *, backward: bool) -> list[Kernel]:
    """Return the kernels of the softmax of `batch` matrices of attention scores."""
    widths = FLOAT_SOFTMAX
    if _width(setup) == 2:
        widths = HALF_SOFTMAX if batch % FUSED_SOFTMAX_GROUP else FUSED_SOFTMAX
    return [
        moving("softmax", setup.dtype, scores, each * _width(setup), backward=backward) for each in widths[backward]
    ]


def _flash(sizes: Sizes, setup: Setup, *, backward: bool) -> Kernel:
    b, s, heads = setup.micro_batch, sizes.sequence, max(1, sizes.heads // setup.tensor)
    queries, d = s // setup.context, sizes.head_size
    flops = 4.0 * b * heads * queries * s * d * (2.5 if backward else 1)
    moved = _width(setup) * b * heads * d * (2 * queries + 2 * s) * (2 if backward else 1)
    name = "cudnn attention" if setup.stack.attention == "fused" else "flash attention"
    if not setup.stack.causal:
        name = f"dense {name}"
    return Kernel(name, "attention", setup.dtype, flops, moved, (b, heads, queries, s, d), backward)


def _mlp(sizes: Sizes, setup: Setup) -> list[Kernel]:
    t, h, tp, e = tokens(sizes, setup), sizes.hidden, setup.tensor, _width(setup)
    residual, linear = _residual_elements(sizes, setup), setup.linear_dtype
    wide = t * sizes.ffn / tp
    passes = 3 if sizes.gated else 2
    if setup.stack.elementwise == "eager" and sizes.gated:
        passes = 5
    return [
        _norm(sizes, setup, residual),
        product("up", linear, t, sizes.up // tp, h, output_bytes=e),
        moving("activation", setup.dtype, wide, passes * e),
        product("down", linear, t, h, sizes.ffn // tp, output_bytes=e),
        _residual(setup, residual),
    ]


def _linear_shapes(sizes: Sizes, setup: Setup) -> list[tuple[str, int, int]]:
    """Name, inputs and outputs of the linear layers of a block on one rank."""
    tp, h = setup.tensor, sizes.hidden
    return [
        ("qkv", h, sizes.qkv // tp),
        ("projection", h // tp, h),
        ("up", h, sizes.up // tp),
        ("down", sizes.ffn // tp, h),
    ]


def _linear_backward(sizes: Sizes, setup: Setup) -> list[Kernel]:
    t, e, linear = tokens(sizes, setup), _width(setup), setup.linear_dtype
    kernels = []
    for name, inputs, outputs in _linear_shapes(sizes, setup):
        kernels.append(product(f"{name} inputs", linear, t, inputs, outputs, output_bytes=e, backward=True))
        kernels.append(product(f"{name} weights", linear, outputs, inputs, t, output_bytes=e, backward=True))
    matrices = sum(inputs * outputs for _, inputs, outputs in _linear_shapes(sizes, setup))
    return [*kernels, *accumulation(setup, matrices)]


def accumulation(setup: Setup, elements: float) -> list[Kernel]:
    """Adds gradients of weights to what earlier microbatches left; nothing where the products do that themselves."""
    if setup.stack.fused_accumulation:
        return []
    bytes_each = _width(setup) + 2 * setup.stack.accumulation_bytes
    return [moving("accumulate", setup.dtype, elements, bytes_each, backward=True)]


def _attention_backward(sizes: Sizes, setup: Setup) -> list[Kernel]:
    e, tp, d, s = _width(setup), setup.tensor, sizes.head_size, sizes.sequence
    if setup.stack.attention != "unfused":
        return [_flash(sizes, setup, backward=True)]
    batch = setup.micro_batch * max(1, sizes.heads // tp)
    scores = float(batch) * s * s
    dtype = setup.dtype
    kernels = [
        product("context inputs", dtype, s, s, d, batch=batch, output_bytes=e, backward=True),
        product("context values", dtype, s, d, s, batch=batch, output_bytes=e, backward=True),
        *_softmax(setup, batch, scores, backward=True),
        product("queries", dtype, s, d, s, batch=batch, output_bytes=e, backward=True),
        product("keys", dtype, s, d, s, batch=batch, output_bytes=e, backward=True),
        moving("transpose", dtype, tokens(sizes, setup) * 4 * sizes.hidden / tp, 2 * e, backward=True),
    ]
    if setup.stack.dropout:
        kernels.insert(2, moving("dropout", dtype, scores, 2 * e + 1, backward=True))
    return kernels


def _elementwise_backward(sizes: Sizes, setup: Setup) -> list[Kernel]:
    t, tp, e, dtype = tokens(sizes, setup), setup.tensor, _width(setup), setup.dtype
    residual, wide = _residual_elements(sizes, setup), t * sizes.ffn / tp
    kind = setup.stack.elementwise
    activation = 5 if sizes.gated else 3
    if kind == "eager" and sizes.gated:
        activation = 8
    kernels = [
        _norm(sizes, setup, residual, backward=True),
        moving("residual", dtype, residual, 3 * e, backward=True),
        moving("activation", dtype, wide, activation * e, backward=True),
        _norm(sizes, setup, residual, backward=True),
        moving("residual", dtype, residual, 3 * e, backward=True),
    ]
    if kind == "megatron" or sizes.biases:
        kernels.append(moving("bias", dtype, t * (sizes.qkv + sizes.up) / tp + 2 * residual, e, backward=True))
    if kind != "megatron" and not sizes.learned_positions:
        rotated = t * (sizes.hidden + sizes.kv_heads * sizes.head_size) / tp
        kernels.append(moving("rotary", dtype, rotated, (8 if kind == "eager" else 2) * e, backward=True))
    if setup.stack.dropout:
        kernels.append(moving("dropout", dtype, 2 * residual, 2 * e + 1, backward=True))
    return kernels


def _casts(sizes: Sizes, setup: Setup) -> tuple[list[Kernel], list[Kernel]]:
    """Casts of activations and of gradients to fp8 or fp4, each in both layouts; none in other precisions."""
    if setup.linear_dtype not in ("fp8", "fp4"):
        return [], []
    t = tokens(sizes, setup)
    narrow = 2 * ELEMENT_BYTES[setup.linear_dtype]
    reads = 2 * _width(setup) if setup.scaling == "current" else _width(setup)
    inputs = t * sum(inputs for _, inputs, _ in _linear_shapes(sizes, setup))
    outputs = t * sum(outputs for _, _, outputs in _linear_shapes(sizes, setup))
    return (
        [moving("cast", setup.dtype, inputs, reads + narrow)],
        [moving("cast", setup.dtype, outputs, reads + narrow, backward=True)],
    )


def _recomputed(sizes: Sizes, setup: Setup, whole: Sequence[Kernel], core: Iterable[Kernel]) -> tuple[Kernel, ...]:
    """Return the kernels of recomputation before a block's backward pass; `whole` are all that can be."""
    if setup.recompute == "none":
        return ()
    if setup.recompute == "selective":
        return tuple(core)
    if setup.recompute == "operations":
        return (*(kernel for kernel in whole if kernel.kind == "memory"), *_every_second(sizes, setup))
    return tuple(whole)


def _every_second(sizes: Sizes, setup: Setup) -> tuple[Kernel, ...]:
    """Products that torchtitan's selective recomputation by operation computes again: every second one.

    Each linear layer has its own, and the last one's result is not needed.
    """
    return tuple(
        product("again", setup.linear_dtype, tokens(sizes, setup), outputs, inputs, output_bytes=_width(setup))
        for inputs, outputs in sizes.linears(setup.tensor)[1:-1:2]
    )
