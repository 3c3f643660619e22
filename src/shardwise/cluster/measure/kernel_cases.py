"""Cases to measure on a device: operations as eager PyTorch calls them, over a range of sizes.

A case makes its operands, which is not timed, and calls one operation on them. The measuring code records what the
operation computes (kind, FLOPs, bytes, shape) in the same way as for the kernels of a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from shardwise.cluster.measure.arena import Arena
from shardwise.cluster.measure.kernel_sizes import CPU, Convolution, KernelSizes

aten = torch.ops.aten

Operands = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class KernelCase:
    """One operation call to measure.

    Attributes:
        make: makes the operands; the first tensor among them is the one written just before the call.
        call: the operation to time.
    """

    make: Callable[[Arena], Operands]
    call: Callable[..., Any]


# ---- memory-bound kernels -------------------------------------------------------------------------------------------


def all_cases(dtype: torch.dtype, sizes: KernelSizes = CPU) -> Iterator[KernelCase]:
    """Yield all cases to measure in one dtype, in the sizes of a kind of device."""
    yield from memory_cases(dtype, sizes)
    yield from matmul_cases(dtype, sizes)
    yield from convolution_cases(dtype, sizes)
    yield from attention_cases(dtype, sizes)


def memory_cases(dtype: torch.dtype, sizes: KernelSizes = CPU) -> Iterator[KernelCase]:
    """Yield the memory-bound cases: elementwise, copies, reductions, norms, losses, embeddings, pooling, updates."""
    for elements in sizes.elements if dtype == torch.float32 else sizes.elements[::2]:
        yield from (_elementwise(name, call, count, elements, dtype) for name, call, count in ELEMENTWISE)
        yield from _in_rows(elements, dtype)
        yield from _copies(elements, dtype)
        yield from _reductions(elements, dtype, sizes.width)
        if dtype == torch.float32:
            yield from _losses(elements, sizes.width)
            yield from _norms(elements, sizes)
            yield from _lookups(elements, sizes)
            yield from _pools(elements)


ELEMENTWISE: tuple[tuple[str, Callable[..., Any], int], ...] = (
    ("add", aten.add.Tensor, 2),
    ("sub", aten.sub.Tensor, 2),
    ("mul", aten.mul.Tensor, 2),
    ("div", lambda a, b: aten.div.Tensor(a, b), 2),
    ("neg", aten.neg.default, 1),
    ("exp", aten.exp.default, 1),
    ("pow", lambda a: aten.pow.Tensor_Scalar(a, 2), 1),
    ("sqrt", aten.sqrt.default, 1),
    ("rsqrt", aten.rsqrt.default, 1),
    ("log", aten.log.default, 1),
    ("tanh", aten.tanh.default, 1),
    ("tanh_backward", aten.tanh_backward.default, 2),
    ("sigmoid", aten.sigmoid.default, 1),
    ("sigmoid_backward", aten.sigmoid_backward.default, 2),
    ("relu", aten.relu.default, 1),
    ("threshold_backward", lambda a, b: aten.threshold_backward.default(a, b, 0), 2),
    ("leaky_relu", aten.leaky_relu.default, 1),
    ("leaky_relu_backward", lambda a, b: aten.leaky_relu_backward.default(a, b, 0.01, False), 2),
    ("gelu", aten.gelu.default, 1),
    ("gelu_backward", aten.gelu_backward.default, 2),
    ("silu", aten.silu.default, 1),
    ("silu_backward", aten.silu_backward.default, 2),
    ("native_dropout", lambda a: aten.native_dropout.default(a, 0.1, True), 1),
    ("eq", aten.eq.Tensor, 2),
    ("add_", aten.add_.Tensor, 2),
    ("lerp_", lambda a, b: aten.lerp_.Scalar(a, b, 0.1), 2),
    ("addcmul_", lambda a, b, c: aten.addcmul_.default(a, b, c, value=1e-3), 3),
    ("addcdiv_", lambda a, b, c: aten.addcdiv_.default(a, b, c, value=1e-9), 3),
    ("fill_", lambda a: aten.fill_.Scalar(a, 1.0), 1),
)
"""Elementwise operations: name, call, number of operands."""


POSITIVE = ("sqrt", "rsqrt", "log")
"""Operations that are measured on positive values: they take another code path for negative ones.

Their operands are never negative in training.
"""


def _elementwise(name: str, call: Callable[..., Any], count: int, elements: int, dtype: torch.dtype) -> KernelCase:
    if name in POSITIVE:
        return KernelCase(lambda arena: (arena.take(elements, dtype=dtype).abs(),), call)
    return KernelCase(lambda arena: tuple(arena.take(elements, dtype=dtype) for _ in range(count)), call)


ROW, HEADS, TOKENS = 16, 4, 128
"""Elements in a short row, heads, and most tokens, for operands that lie in short rows of memory.

The rows are halves of attention heads, as rotary embeddings take them.
"""


def _in_rows(elements: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    """Yield elementwise cases on halves of heads: slices of a fused QKV projection, and a table shared by all heads."""
    tokens = min(TOKENS, max(2, elements // (HEADS * ROW)))
    samples = max(1, elements // (HEADS * ROW * tokens))
    width = 2 * HEADS * ROW

    def half(arena: Arena) -> Tensor:
        projected = arena.take(samples, tokens, 3 * width, dtype=dtype)[..., :width]
        return projected.view(samples, tokens, HEADS, 2 * ROW).transpose(1, 2)[..., :ROW]

    def halves(arena: Arena) -> Operands:
        return half(arena), half(arena)

    yield KernelCase(lambda arena: (half(arena), arena.take(tokens, ROW, dtype=dtype)), aten.mul.Tensor)
    yield KernelCase(halves, aten.add.Tensor)
    yield KernelCase(lambda arena: (half(arena),), aten.neg.default)


def _copies(elements: int, dtype: torch.dtype) -> Iterator[KernelCase]:
    heads, width, rows = _heads(elements)
    other = torch.bfloat16 if dtype == torch.float32 else torch.float32

    def permuted(arena: Arena) -> Operands:
        return (arena.take(rows, heads, width, dtype=dtype).transpose(0, 1),)

    def halves(arena: Arena) -> Operands:
        return arena.take(rows * heads, width // 2, dtype=dtype), arena.take(rows * heads, width // 2, dtype=dtype)

    yield KernelCase(permuted, lambda a: aten.clone.default(a, memory_format=torch.contiguous_format))
    yield KernelCase(
        lambda arena: (arena.take(elements, dtype=dtype), arena.take(elements, dtype=dtype)), aten.copy_.default
    )
    yield KernelCase(
        lambda arena: (arena.take(elements, dtype=dtype),), lambda a: aten._to_copy.default(a, dtype=other)
    )
    yield KernelCase(halves, lambda a, b: aten.cat.default([a, b], -1))
    yield KernelCase(
        lambda arena: tuple(arena.take(elements // 4, dtype=dtype) for _ in range(4)),
        lambda *parts: aten.stack.default(list(parts)),
    )
    yield KernelCase(
        lambda arena: (*halves(arena), torch.zeros(rows * heads, width // 2, dtype=torch.bool, device=arena.device)),
        lambda a, b, mask: aten.where.self(mask, a, b),
    )
    yield KernelCase(
        lambda arena: (arena.take(rows * heads, width // 2, dtype=dtype),),
        lambda a: aten.slice_backward.default(a, [rows * heads, width], 1, 0, width // 2, 1),
    )


def _heads(elements: int) -> tuple[int, int, int]:
    """Return the number of heads, the features per head, and the number of rows that make up `elements`."""
    heads, width = (4, 16) if elements < 4096 else (4, 32)
    return heads, width, max(1, elements // (heads * width))


def _reductions(elements: int, dtype: torch.dtype, width: int) -> Iterator[KernelCase]:
    width = min(width, elements)
    rows = elements // width

    def matrix(arena: Arena) -> Operands:
        return (arena.take(rows, width, dtype=dtype),)

    def rebuilt(arena: Arena) -> Operands:
        return arena.take(rows, width, dtype=dtype), arena.take(rows, width, dtype=dtype)

    yield KernelCase(matrix, lambda a: aten.sum.dim_IntList(a, [0]))
    yield KernelCase(matrix, lambda a: aten.mean.dim(a, [-1], True))
    yield KernelCase(matrix, lambda a: aten.amax.default(a, [-1]))
    yield KernelCase(matrix, lambda a: aten.linalg_vector_norm.default(a))
    yield KernelCase(matrix, lambda a: aten._softmax.default(a, -1, False))
    yield KernelCase(rebuilt, lambda a, b: aten._softmax_backward_data.default(a, b, -1, a.dtype))
    yield KernelCase(matrix, lambda a: aten._log_softmax.default(a, -1, False))
    yield KernelCase(rebuilt, lambda a, b: aten._log_softmax_backward_data.default(a, b, -1, a.dtype))


def _losses(elements: int, width: int) -> Iterator[KernelCase]:
    classes = min(width, elements)
    rows = elements // classes
    target: dict[torch.device, Tensor] = {}

    def scores(arena: Arena) -> Operands:
        if arena.device not in target:
            target[arena.device] = arena.integers(rows, below=classes)
        return arena.take(rows, classes), target[arena.device]

    def backwards(arena: Arena) -> Operands:
        return *scores(arena), arena.take(1).view(()), torch.ones((), device=arena.device)

    yield KernelCase(scores, lambda a, t: aten.nll_loss_forward.default(a, t, None, 1, -100))
    yield KernelCase(backwards, lambda a, t, g, total: aten.nll_loss_backward.default(g, a, t, None, 1, -100, total))


def _norms(elements: int, sizes: KernelSizes) -> Iterator[KernelCase]:
    width = min(sizes.width, elements)
    rows = elements // width

    def layers(arena: Arena) -> Operands:
        return arena.take(rows, width), arena.take(width), arena.take(width)

    def layers_back(arena: Arena) -> Operands:
        return (
            arena.take(rows, width),
            arena.take(rows, width),
            arena.take(rows, 1),
            arena.take(rows, 1),
            arena.take(width),
            arena.take(width),
        )

    yield KernelCase(layers, lambda a, w, b: aten.native_layer_norm.default(a, [width], w, b, 1e-5))
    yield KernelCase(
        layers_back,
        lambda g, a, mean, scale, w, b: aten.native_layer_norm_backward.default(
            g, a, [width], mean, scale, w, b, [True, True, True]
        ),
    )
    yield from _channel_norms(elements, min(sizes.channels, elements // 8))  # a variance needs several values


def _channel_norms(elements: int, channels: int) -> Iterator[KernelCase]:
    places = elements // channels

    def batch(arena: Arena) -> Operands:
        return (
            arena.take(1, channels, places),
            arena.take(channels),
            arena.take(channels),
            arena.take(channels),
            arena.take(channels),
        )

    def batch_back(arena: Arena) -> Operands:
        return arena.take(1, channels, places), arena.take(1, channels, places), *(arena.take(channels) for _ in "123")

    yield KernelCase(batch, lambda a, w, b, m, v: aten.native_batch_norm.default(a, w, b, m, v, True, 0.1, 1e-5))
    yield KernelCase(
        batch_back,
        lambda g, a, w, m, v: aten.native_batch_norm_backward.default(
            g, a, w, None, None, m, v, True, 1e-5, [True, True, True]
        ),
    )
    yield KernelCase(
        lambda arena: (arena.take(1, channels, places), arena.take(channels), arena.take(channels)),
        lambda a, w, b: aten.native_group_norm.default(a, w, b, 1, channels, places, 4, 1e-5),
    )
    yield KernelCase(
        lambda arena: (
            arena.take(1, channels, places),
            arena.take(1, channels, places),
            arena.take(1, 4),
            arena.take(1, 4),
            arena.take(channels),
        ),
        lambda g, a, m, v, w: aten.native_group_norm_backward.default(
            g, a, m, v, w, 1, channels, places, 4, [True, True, True]
        ),
    )


def _lookups(elements: int, sizes: KernelSizes) -> Iterator[KernelCase]:
    width = min(sizes.width, elements)
    rows, vocabulary = elements // width, sizes.vocabulary

    def table(arena: Arena) -> Operands:
        return arena.take(vocabulary, width), arena.integers(rows, below=vocabulary)

    def back(arena: Arena) -> Operands:
        return arena.take(rows, width), arena.integers(rows, below=vocabulary)

    yield KernelCase(table, lambda a, i: aten.embedding.default(a, i))
    yield KernelCase(back, lambda g, i: aten.embedding_dense_backward.default(g, i, vocabulary, -1, False))


def _pools(elements: int) -> Iterator[KernelCase]:
    side = max(2, round(elements ** (1 / 3) / 4) * 2)
    channels = max(1, elements // side**3)

    def volume(arena: Arena) -> Operands:
        return (arena.take(1, channels, side, side, side),)

    def volume_back(arena: Arena) -> Operands:
        (x,) = volume(arena)
        pooled, places = aten.max_pool3d_with_indices.default(x, [2] * 3, [2] * 3)
        return pooled, x, places

    def image(arena: Arena) -> Operands:
        return (arena.take(1, channels * side, side, side),)

    def image_back(arena: Arena) -> Operands:
        (x,) = image(arena)
        pooled, places = aten.max_pool2d_with_indices.default(x, [2, 2], [2, 2])
        return pooled, x, places

    yield KernelCase(volume, lambda a: aten.max_pool3d_with_indices.default(a, [2] * 3, [2] * 3))
    yield KernelCase(
        volume_back,
        lambda g, a, i: aten.max_pool3d_with_indices_backward.default(
            g, a, [2] * 3, [2] * 3, [0] * 3, [1] * 3, False, i
        ),
    )
    yield KernelCase(image, lambda a: aten.max_pool2d_with_indices.default(a, [2, 2], [2, 2]))
    yield KernelCase(
        image_back,
        lambda g, a, i: aten.max_pool2d_with_indices_backward.default(g, a, [2, 2], [2, 2], [0, 0], [1, 1], False, i),
    )


# ---- matmuls --------------------------------------------------------------------------------------------------------


def matmul_cases(dtype: torch.dtype, sizes: KernelSizes = CPU) -> Iterator[KernelCase]:
    """Yield matmuls of single matrices and of batches of matrices."""
    for m, n, k in sizes.products:
        yield _product(m, n, k, dtype)
    for batch, m, n, k in sizes.batched:
        yield _products(batch, m, n, k, dtype)


def _products(batch: int, m: int, n: int, k: int, dtype: torch.dtype) -> KernelCase:
    return KernelCase(
        lambda arena: (arena.take(batch, m, k, dtype=dtype), arena.take(batch, k, n, dtype=dtype)), aten.bmm.default
    )


def _product(m: int, n: int, k: int, dtype: torch.dtype) -> KernelCase:
    return KernelCase(lambda arena: (arena.take(m, k, dtype=dtype), arena.take(k, n, dtype=dtype)), aten.mm.default)


# ---- convolutions ---------------------------------------------------------------------------------------------------


def convolution_cases(dtype: torch.dtype, sizes: KernelSizes = CPU) -> Iterator[KernelCase]:
    """Yield forward and backward convolutions in two and three dimensions."""
    for shape in (*sizes.convolutions, *(sizes.single if dtype == torch.float32 else ())):
        yield from _convolutions(shape, False, dtype)
    for shape in sizes.transposed:
        yield from _convolutions(shape, True, dtype)


def _convolutions(shape: Convolution, transposed: bool, dtype: torch.dtype) -> Iterator[KernelCase]:
    dimensions, batch, inputs, outputs, side, window = shape
    stride, padding = (window, 0) if window == 2 else (1, window // 2)
    where = ([stride] * dimensions, [padding] * dimensions, [1] * dimensions, transposed, [0] * dimensions, 1)
    reached = side * stride if transposed else side // stride
    channels = (inputs, outputs) if transposed else (outputs, inputs)

    def forward(arena: Arena) -> Operands:
        return (
            arena.take(batch, inputs, *[side] * dimensions, dtype=dtype),
            arena.take(*channels, *[window] * dimensions, dtype=dtype),
            arena.take(outputs, dtype=dtype),
        )

    def backward(arena: Arena) -> Operands:
        x, weight, _ = forward(arena)
        return arena.take(batch, outputs, *[reached] * dimensions, dtype=dtype), x, weight

    yield KernelCase(forward, lambda x, w, b: aten.convolution.default(x, w, b, *where))
    needed = [inputs > 3, True, True]  # no gradient flows back to inputs that come from the data
    yield KernelCase(backward, lambda g, x, w: aten.convolution_backward.default(g, x, w, [outputs], *where, needed))


# ---- attention ------------------------------------------------------------------------------------------------------


def attention_cases(dtype: torch.dtype, sizes: KernelSizes = CPU) -> Iterator[KernelCase]:
    """Yield scaled dot-product attention with and without a causal mask, forward and backward."""
    for (batch, heads, sequence, size), causal in product(sizes.attentions, (False, True)):
        yield from _attentions(batch, heads, sequence, size, causal, dtype)


def _attentions(
    batch: int, heads: int, sequence: int, size: int, causal: bool, dtype: torch.dtype
) -> Iterator[KernelCase]:
    def forward(arena: Arena) -> Operands:
        return tuple(arena.take(batch, sequence, heads, size, dtype=dtype).transpose(1, 2) for _ in range(3))

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal)

    def backward(arena: Arena) -> Operands:
        operands = [each.detach().requires_grad_() for each in forward(arena)]
        with torch.enable_grad():
            output = attend(*operands)
        return arena.take(batch, sequence, heads, size, dtype=dtype).transpose(1, 2), output, operands

    yield KernelCase(forward, attend)
    yield KernelCase(backward, lambda g, output, operands: torch.autograd.grad(output, operands, g))
