"""Count the work of one operation for a device: kind, FLOPs and bytes, from the operation and its tensors.

FLOPs are counted as in `torch.utils.flop_counter`: a multiply-add is two. Attention counts in full, without a causal
mask, and its backward pass, which recomputes the scores, counts 2.5 times the forward pass. Operations that torch does
not count, attention on the CPU and recurrent layers, have formulas here.

Bytes are the operands read once plus the results written once. An element that an expanded dimension repeats counts
once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import inf, prod
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

from shardwise.cluster.curves import NATIVE
from shardwise.predict.profile.kernel import Kernel

aten = torch.ops.aten

DTYPE_NAMES = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.bfloat16: "bf16",
    torch.float16: "fp16",
}
"""Floating dtype -> its name in `cluster.DTYPES`.

An operation without floating operands is timed as float32, but its bytes are counted with its real element sizes.
"""

SHORT_ROW = 64
"""Row length, in elements, below which stepping from row to row dominates an elementwise operation."""

Shape = tuple[int, ...]
Counted = tuple[str, float, Shape, bool]
"""(kind, FLOPs, shape, True if it is a kernel of the backward pass), as in `Kernel`."""
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
"""Most elements in the first four dimensions of the input for which torch uses its own CPU convolution.

Larger inputs, and batches of several samples, use oneDNN (ATen/native/Convolution.cpp: `ConvParams::use_mkldnn`).
"""

_ROWS_READ = {aten.embedding, aten.index_select, aten.gather, aten.index, aten.select_backward, aten.slice_backward}
"""Operations that read at most as many bytes of their first operand as they write."""

_ADDED_TO = {aten.scatter_add_}
"""Operations that read and write as many elements of their first operand as their last one has."""

_INTO_GATHERED = "all_gather_copy_in"
"""Name of `fully_shard`'s operation that copies shards into this rank's part of the buffer of an all-gather."""


def counts(*operations: Any) -> Callable[[Counter], Counter]:
    """Return a decorator that registers a formula for `operations`."""

    def register(counter: Counter) -> Counter:
        _COUNTERS.update(dict.fromkeys(operations, counter))
        return counter

    return register


def kernel_of(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any, when: str) -> Kernel | None:
    """Return the kernel that a call of `operation` runs.

    Returns None if the call neither computes nor moves data: views, empty tensors, queries of a tensor's properties.

    Args:
        operation: overload that the dispatcher calls.
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        result: result of the call.
        when: phase of the step, for `Kernel.when`.
    """
    packet = operation.overloadpacket
    if packet in _FREE or operation.is_view or operation.namespace == "prim":  # `prim` queries properties of tensors
        return None
    inputs, outputs = list(tensors((args, kwargs))), list(tensors(result))
    if not outputs and not inputs:
        return None
    if outputs and all(not output.numel() for output in outputs):
        return None
    counter = _COUNTERS.get(packet) or _OTHERS.get(f"{operation.namespace}::{packet.__name__}")
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
    return Kernel(name, kind, dtype, flops, _bytes(packet, args, inputs, outputs), shape, backward, when=when)


def _row(operands: Sequence[Tensor]) -> float:
    """Return the number of elements that are contiguous in all operands of an elementwise operation.

    Returns infinity if all elements of the operation are. Neighbouring dimensions merge if, for every operand, the
    outer stride is the inner stride times the inner size, as in torch's TensorIterator (ATen/TensorIterator.cpp,
    coalesce_dimensions).
    """
    shape: Sequence[int] = operands[-1].shape
    if all(operand.shape == shape and operand.is_contiguous() for operand in operands):
        return inf
    shape = _broadcast([operand.shape for operand in operands])
    strides = [_strides(operand, shape) for operand in operands]
    order = [d for d in sorted(range(len(shape)), key=lambda d: (strides[-1][d], -d)) if shape[d] > 1]
    row = 1
    for index, dim in enumerate(order):
        before = order[index - 1] if index else None
        if before is not None and any(each[dim] != each[before] * shape[before] for each in strides):
            return row
        row *= shape[dim]
    return inf


def _broadcast(shapes: Sequence[Sequence[int]]) -> tuple[int, ...]:
    """Return the broadcast shape of the operands of an elementwise operation.

    Under dispatch modes torch's own broadcasting functions are as slow as the operation itself, so that this function
    and `_strides` replace them.
    """
    longest = max(map(len, shapes))
    padded = [(*[1] * (longest - len(shape)), *shape) for shape in shapes]
    return tuple(map(max, zip(*padded, strict=True)))


def _strides(operand: Tensor, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the strides of an operand expanded to `shape`; 0 in repeated dimensions and those of size 1."""
    own = [0 if size == 1 else stride for size, stride in zip(operand.shape, operand.stride(), strict=True)]
    return (*[0] * (len(shape) - len(own)), *own)


def tensors(tree: Any) -> Iterator[Tensor]:
    """Yield the tensors in nested tuples, lists and dicts, in order."""
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


def _bytes(packet: Any, args: tuple[Any, ...], inputs: list[Tensor], outputs: list[Tensor]) -> float:
    """Count the bytes that a call reads and writes.

    A change in place of a list of tensors (`foreach`) returns nothing, and writes its first argument. The copy of
    shards into the buffer of an all-gather writes only the part of this rank.
    """
    if packet.__name__ == _INTO_GATHERED:
        return 2.0 * sum(_size(shard) for shard in inputs[:-1])
    if packet.__name__.startswith("_foreach_") and packet.__name__.endswith("_"):
        outputs = list(tensors(args[0]))
    if packet in _ADDED_TO:
        return float(sum(map(_size, inputs[1:])) + 2 * _size(inputs[-1]))
    written = sum(_size(output) for output in outputs)
    read = [_size(each) for each in inputs]
    if packet in _ROWS_READ and read:
        read[0] = min(read[0], written)
    return float(written + sum(read))


def _size(tensor: Tensor) -> int:
    """Return the bytes of the distinct elements of a tensor; a repeated dimension (stride 0) counts once."""
    if not tensor.numel():
        return 0
    elements = prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride)
    return elements * tensor.element_size()


def _formula(packet: Any, args: tuple[Any, ...], result: Any) -> float:
    return float(flop_registry[packet](*args, out_val=result))


# ---- matmuls --------------------------------------------------------------------------------------------------------


@counts(aten.mm)
def _mm(args: tuple[Any, ...], result: Any) -> Counted:
    (m, k), (_, n) = args[0].shape, args[1].shape
    return "matmul", 2.0 * m * n * k, (1, m, n, k), False


@counts(aten.addmm, aten.addmm_)
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


# ---- mixtures of experts --------------------------------------------------------------------------------------------


@counts(aten._grouped_mm)
def _grouped(args: tuple[Any, ...], result: Any) -> Counted:
    """Count a grouped matmul as a batch of equal ones: each row meets the matrix of one expert.

    A token that goes to several experts has a row for each of them. Either (rows, k) @ (experts, k, n), or for the
    gradient of the weights (k, rows) @ (rows, n), which gives (experts, k, n).
    """
    a, b = args[:2]
    if b.dim() == 2:
        return _experts(b.shape[0], result.shape, times=1, backward=False)
    return _experts(a.shape[0], b.shape, times=1, backward=False)


def _grouped_fallback(args: tuple[Any, ...], result: Any) -> Counted:
    return _experts(args[0].shape[0], args[1].shape, times=1, backward=False)


def _grouped_fallback_backward(args: tuple[Any, ...], result: Any) -> Counted:
    return _experts(args[0].shape[0], args[1].shape, times=2, backward=True)  # of the rows, and of the weights


def _experts(rows: int, weights: Sequence[int], *, times: int, backward: bool) -> Counted:
    """Count `times` matmuls of rows that are spread evenly over experts with `weights` (experts, k, n)."""
    experts, k, n = weights
    return "matmul", 2.0 * times * rows * k * n, (times * experts, max(1, rows // experts), n, k), backward


_OTHERS: dict[str, Counter] = {
    "transformers::grouped_mm_fallback": _grouped_fallback,
    "transformers::grouped_mm_fallback_backward": _grouped_fallback_backward,
}
"""Formulas for operations that other packages register when they are imported, by name."""


# ---- recurrent layers -----------------------------------------------------------------------------------------------


@counts(aten.mkldnn_rnn_layer)
def _rnn(args: tuple[Any, ...], result: Any) -> Counted:
    return _recurrent(args[0], args[1], args[2], 1, backward=False)


@counts(aten.mkldnn_rnn_layer_backward)
def _rnn_backward(args: tuple[Any, ...], result: Any) -> Counted:
    return _recurrent(args[0], args[1], args[2], 2, backward=True)


def _recurrent(x: Tensor, to_input: Tensor, to_hidden: Tensor, times: int, *, backward: bool) -> Counted:
    """Count a recurrent layer over a whole sequence as one matmul of all tokens with both weight matrices.

    Together the matrices have the shape (gates * hidden size, input features + hidden size). `times` is the number of
    such matmuls: 1 forward, 2 backward.
    """
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
    """Count the backward pass of attention as 2.5 times its forward pass.

    It has five matmuls instead of two: one recomputes the scores, four compute gradients (Dao et al. 2022).
    """
    flops, shape = _attended(*args[1:4])
    return "attention", 2.5 * flops, shape, True


def _causal(operation: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Return whether a call of attention has the argument `is_causal` set."""
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
    """Return the shape (batch, channels in / groups, channels out, positions, window size) of a convolution.

    Positions are the positions of the window: elements of the output per channel, or of the input if the convolution is
    transposed. `args` holds `transposed` and `groups` at the same indices as the arguments of `aten.convolution`.
    """
    channels_in, groups, transposed = x.shape[1], args[8], args[6]
    positions = prod((x if transposed else output).shape[2:])
    return x.shape[0], channels_in // groups, output.shape[1], positions, prod(weight.shape[2:])


def _native(x: Tensor, weight: Tensor, *, groups: int) -> bool:
    """Return whether torch computes a convolution with its own CPU code instead of oneDNN, see `SMALL`."""
    window = weight.shape[2:]
    wide = len(window) > 1 and min(window[-2:]) > 3
    return x.dtype == torch.float32 and x.shape[0] == 1 and groups == 1 and prod(x.shape[:4]) <= SMALL and not wide


def workspace(kernel: Kernel) -> int:
    """Return the bytes of scratch memory that a CPU kernel needs while it runs.

    Only convolutions by torch's own code need any: they unfold every window into a float32 matrix.
    """
    if not kernel.operation.startswith(NATIVE):
        return 0
    batch, inputs, _, positions, window = kernel.shape
    return batch * inputs * positions * window * 4 if window > 1 else 0
