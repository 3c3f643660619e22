"""What one operation asks of a device: kind, FLOPs and bytes, from the operation and its tensors.

FLOPs are those of `torch.utils.flop_counter` (a multiply-add is two; attention in full, its backward pass with the
scores computed again: 2.5 times the forward pass), with formulas of our own where that counts nothing: attention on
the CPU, recurrent layers. Bytes are the operands read and the results written once, each element once, however often
it is repeated by an expanded dimension.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from shardwise.cluster.curves import NATIVE
from shardwise.predict.kernel import Kernel

aten = torch.ops.aten

DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
"""Of floating dtypes as `cluster.DTYPES` spells them; whole numbers count as float32, their bytes as they are."""

SHORT_ROW = 64
"""Elements of a row below which an elementwise operation spends its time on going from row to row."""

Shape = tuple[int, ...]
Counted = tuple[str, float, Shape, bool]
"""Kind, FLOPs, shape and whether it is a kernel of the backward pass, as in `Kernel`."""
Counter = Callable[[tuple[Any, ...], Any], Counted]

_COUNTERS: dict[Any, Counter] = {}
_FREE = {
    aten.empty,
    aten.empty_like,
    aten.empty_strided,
    aten.new_empty,
    aten.new_empty_strided,
    aten.detach,
    aten.alias,
    aten.resize_,
    aten.set_,
    aten.is_pinned,
    aten._local_scalar_dense,
    aten.lift_fresh,
    aten.view,
    aten._unsafe_view,
    aten._reshape_alias,
    aten.record_stream,
}
SMALL = 20480
"""Elements of the first four dimensions up to which torch computes a convolution of a single sample with code of its
own on a CPU, not with oneDNN (ATen/native/Convolution.cpp: `ConvParams::use_mkldnn`)."""

_ROWS_READ = {aten.embedding, aten.index_select, aten.gather, aten.index, aten.select_backward, aten.slice_backward}
"""Operations that read no more of their first operand than they write."""


def counts(*operations: Any) -> Callable[[Counter], Counter]:
    """Registers a formula."""

    def register(counter: Counter) -> Counter:
        _COUNTERS.update(dict.fromkeys(operations, counter))
        return counter

    return register


def kernel_of(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, when: str) -> Kernel | None:
    """The kernel that a call of `operation` is; None where it computes and moves nothing (views, empty tensors)."""
    packet = operation.overloadpacket
    if packet in _FREE or operation.is_view or operation.namespace == "prim":  # that asks for properties of tensors
        return None
    inputs, outputs = list(tensors((args, kwargs))), list(tensors(result))
    if not outputs and not inputs:
        return None
    if outputs and all(not output.numel() for output in outputs):
        return None
    counter = _COUNTERS.get(packet)
    kind, flops, shape, backward = (
        ("memory", 0.0, (max((o.numel() for o in outputs or inputs), default=0),), when == "backward")
        if counter is None
        else counter(args, result)
    )
    dtype = _dtype([*inputs, *outputs])
    name = f"{operation.namespace}.{packet.__name__}"
    if kind == "attention" and not _causal(operation, args, kwargs):
        name = f"dense {name}"
    if kind == "convolution" and _native(*(args[1:3] if backward else args[:2]), groups=args[9 if backward else 8]):
        name = f"{NATIVE} {name}"
    if kind == "memory" and torch.Tag.pointwise in operation.tags and packet is not aten.clone:
        name = f"rows {name}" if _row([*inputs, *outputs]) < SHORT_ROW else name
    return Kernel(name, kind, dtype, flops, _bytes(packet, inputs, outputs), shape, backward, when=when)


def _row(operands: Sequence[Tensor]) -> float:
    """Elements that lie next to each other in all operands of an elementwise operation; infinite where all of them do.

    Neighbouring dimensions are one where, for every operand, the outer stride is the inner stride times the inner size,
    as torch's TensorIterator merges them (ATen/TensorIterator.cpp, coalesce_dimensions).
    """
    shape: Sequence[int] = operands[-1].shape
    if all(operand.shape == shape and operand.is_contiguous() for operand in operands):
        return inf
    shape = _broadcast([operand.shape for operand in operands])
    strides = [_strides(operand, shape) for operand in operands]
    order = [d for d in sorted(range(len(shape)), key=lambda d: (strides[-1][d], -d)) if shape[d] > 1]
    row = 1
    for place, dim in enumerate(order):
        before = order[place - 1] if place else None
        if before is not None and any(each[dim] != each[before] * shape[before] for each in strides):
            return row
        row *= shape[dim]
    return inf


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """The shape of operands of an elementwise operation together. Worked out here: under dispatch modes, torch's own
    functions for it and for what follows are as slow as the operation itself.
    """
    longest = max(map(len, shapes))
    padded = [(*[1] * (longest - len(shape)), *shape) for shape in shapes]
    return tuple(map(max, zip(*padded, strict=True)))


def _strides(operand: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Of an operand that is expanded to a shape."""
    own = [0 if size == 1 else stride for size, stride in zip(operand.shape, operand.stride(), strict=True)]
    return (*[0] * (len(shape) - len(own)), *own)


def tensors(tree: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(tree, Tensor):
        yield tree
    elif isinstance(tree, (list, tuple)):
        for item in tree:
            yield from tensors(item)
    elif isinstance(tree, dict):
        for item in tree.values():
            yield from tensors(item)


def _dtype(operands: Iterable[Tensor]) -> str:
    return next((DTYPE_NAMES[t.dtype] for t in operands if t.dtype in DTYPE_NAMES), "float32")


def _bytes(packet: Any, inputs: list[Tensor], outputs: list[Tensor]) -> float:
    written = sum(_size(output) for output in outputs)
    read = [_size(each) for each in inputs]
    if packet in _ROWS_READ and read:
        read[0] = min(read[0], written)
    return float(written + sum(read))


def _size(tensor: Tensor) -> int:
    """Bytes of the elements that lie in memory: a dimension that is only repeated (stride 0) counts once."""
    if not tensor.numel():
        return 0
    elements = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return elements * tensor.element_size()


def _formula(packet: Any, args: tuple[Any, ...], result: Any) -> float:
    return float(flop_registry[packet](*args, out_val=result))


# ---- matrix products ------------------------------------------------------------------------------------------------


@counts(aten.mm)
def _mm(args: tuple[Any, ...], result: Any) -> Counted:
    (m, k), (_, n) = args[0].shape, args[1].shape
    return "matmul", 2.0 * m * n * k, (1, m, n, k), False


@counts(aten.addmm)
def _addmm(args: tuple[Any, ...], result: Any) -> Counted:
    return _mm(args[1:], result)


@counts(aten.bmm)
def _bmm(args: tuple[Any, ...], result: Any) -> Counted:
    (batch, m, k), n = args[0].shape, args[1].shape[2]
    return "matmul", 2.0 * batch * m * n * k, (batch, m, n, k), False


@counts(aten.baddbmm)
def _baddbmm(args: tuple[Any, ...], result: Any) -> Counted:
    return _bmm(args[1:], result)


@counts(aten.addmv, aten.mv, aten.dot, aten.addr, aten.ger)
def _vectors(args: tuple[Any, ...], result: Any) -> Counted:
    elements = max(each.numel() for each in args if isinstance(each, Tensor))
    return "memory", 2.0 * elements, (elements,), False


# ---- recurrent layers -----------------------------------------------------------------------------------------------


@counts(aten.mkldnn_rnn_layer)
def _rnn(args: tuple[Any, ...], result: Any) -> Counted:
    return _recurrent(args[0], args[1], args[2], 1, backward=False)


@counts(aten.mkldnn_rnn_layer_backward)
def _rnn_backward(args: tuple[Any, ...], result: Any) -> Counted:
    return _recurrent(args[0], args[1], args[2], 2, backward=True)


def _recurrent(x: Tensor, to_input: Tensor, to_hidden: Tensor, times: int, *, backward: bool) -> Counted:
    """One layer over a whole sequence: products of every token with both matrices, (gates * hidden, features)."""
    steps, samples = x.shape[0], x.shape[1]
    gates, features = to_input.shape[0], to_input.shape[1] + to_hidden.shape[1]
    flops = 2.0 * times * steps * samples * gates * features
    return "matmul", flops, (1, steps * samples, gates, features), backward


# ---- attention ------------------------------------------------------------------------------------------------------


@counts(
    aten._scaled_dot_product_flash_attention_for_cpu,
    aten._scaled_dot_product_flash_attention,
    aten._scaled_dot_product_efficient_attention,
    aten._scaled_dot_product_cudnn_attention,
)
def _attention(args: tuple[Any, ...], result: Any) -> Counted:
    flops, shape = _attended(*args[:3])
    return "attention", flops, shape, False


@counts(
    aten._scaled_dot_product_flash_attention_for_cpu_backward,
    aten._scaled_dot_product_flash_attention_backward,
    aten._scaled_dot_product_efficient_attention_backward,
    aten._scaled_dot_product_cudnn_attention_backward,
)
def _attention_backward(args: tuple[Any, ...], result: Any) -> Counted:
    """Five products where the forward pass has two: the scores again, and the gradients of both (Dao et al. 2022)."""
    flops, shape = _attended(*args[1:4])
    return "attention", 2.5 * flops, shape, True


def _causal(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether a call of attention looks back only."""
    names = [argument.name for argument in operation._schema.arguments]
    given = {**dict(zip(names, args, strict=False)), **kwargs}
    return bool(given.get("is_causal", False))


def _attended(query: Tensor, key: Tensor, value: Tensor) -> tuple[float, Shape]:
    batch, heads, queries, size = query.shape
    keys = key.shape[2]
    flops = 2.0 * batch * heads * queries * keys * (size + value.shape[3])
    return flops, (batch, heads, queries, keys, size)


# ---- convolutions ---------------------------------------------------------------------------------------------------


@counts(aten.convolution, aten._convolution)
def _convolution(args: tuple[Any, ...], result: Any) -> Counted:
    return "convolution", _formula(aten.convolution, args, result), _convolved(args[0], args[1], result, args), False


@counts(aten.convolution_backward)
def _convolution_backward(args: tuple[Any, ...], result: Any) -> Counted:
    shape = _convolved(args[1], args[2], args[0], args[1:])
    return "convolution", _formula(aten.convolution_backward, args, result), shape, True


def _convolved(x: Tensor, weight: Tensor, output: Tensor, args: tuple[Any, ...]) -> Shape:
    """(batch, channels in / groups, channels out, positions, window); `args` end as those of `convolution` do.

    Positions are those where the window is laid: of the output, of the input where the convolution is transposed.
    """
    channels_in, groups, transposed = x.shape[1], args[8], args[6]
    positions = prod((x if transposed else output).shape[2:])
    return x.shape[0], channels_in // groups, output.shape[1], positions, prod(weight.shape[2:])


def _native(x: Tensor, weight: Tensor, *, groups: int) -> bool:
    """Whether torch takes its own code on a CPU; see `SMALL`."""
    window = weight.shape[2:]
    wide = len(window) > 1 and min(window[-2:]) > 3
    return x.dtype == torch.float32 and x.shape[0] == 1 and groups == 1 and prod(x.shape[:4]) <= SMALL and not wide


def workspace(kernel: Kernel) -> int:
    """Bytes that a kernel on a CPU needs while it runs: a convolution by torch's own code lays out every window."""
    if not kernel.operation.startswith(NATIVE):
        return 0
    batch, inputs, _, positions, window = kernel.shape
    return batch * inputs * positions * window * 4 if window > 1 else 0
