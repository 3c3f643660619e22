"""Sizes of compressed gradients: which are compressed, and the messages that replicas then send.

compress           a whole gradient (all-reduce)                        one that is scattered (reduce-scatter)
powersgd:R         P = M Q, and what is sent exactly; then Q = M' P     P; Q; what is sent exactly
topk:S             values and places of the largest, gathered           the same of each part, to its worker
int8 fp8 sign bf16 each part to one worker, which sums; then the sums   each part to its worker
"""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, prod

from shardwise.options import Compression

BLOCK = 256
"""Elements of a gradient that share a scale in the codecs `int8`, `fp8` and `sign`."""

SCALE_BYTES = 4
"""Bytes of a block's scale, in float32."""

PLACE_BYTES = 4
"""Bytes of an element's place in a gradient (`topk`)."""

WORTH = 2
"""Least ratio of a matrix's elements to those of its factors (`powersgd`), as torch's `min_compression_rate`."""

CODE_BITS = {"int8": 8, "fp8": 8, "sign": 1, "bf16": 16}
"""Bits of an element in each codec."""

Message = tuple[str, int]
"""(operation of `Collective`, bytes)."""

Shape = tuple[int, ...]


def is_factored(shape: Sequence[int], rank: int) -> bool:
    """Return whether PowerSGD sends a gradient of this shape as two factors; vectors and small matrices are exact."""
    if len(shape) < 2:
        return False
    rows, columns = matrix(shape)
    return WORTH * rank * (rows + columns) < rows * columns


def matrix(shape: Sequence[int]) -> tuple[int, int]:
    """Return (rows, columns) of a gradient as a matrix: the first dimension, and the product of the others."""
    return shape[0], prod(shape[1:])


def part_elements(compression: Compression, elements: int, ranks: int) -> int:
    """Return the elements of a worker's part of a flat gradient that codecs encode: whole blocks, padded."""
    unit = 1 if compression.kind == "bf16" else BLOCK
    return unit * ceil(ceil(elements / ranks) / unit)


def code_bytes(compression: Compression, elements: int) -> int:
    """Return the bytes of so many encoded elements, in whole blocks, with their scales."""
    scales = 0 if compression.kind == "bf16" else elements // BLOCK * SCALE_BYTES
    return elements * CODE_BITS[compression.kind] // 8 + scales


def largest(compression: Compression, elements: int) -> int:
    """Return the number of elements that top-k sends of so many, at least 1."""
    return max(1, ceil(compression.number * elements))


def whole_messages(
    compression: Compression, shapes: Sequence[Shape], ranks: int, itemsize: int = 4
) -> tuple[Message, ...]:
    """Return the messages that join a flat gradient on `ranks` workers, in order.

    Args:
        compression: the compression.
        shapes: shapes of the gradients in it.
        ranks: number of workers.
        itemsize: bytes of an element that is not compressed.
    """
    elements = sum(map(prod, shapes))
    if not elements:
        return ()
    if compression.kind == "powersgd":
        rank = int(compression.number)
        sides = [matrix(shape) for shape in shapes if is_factored(shape, rank)]
        exact = elements - sum(rows * columns for rows, columns in sides)
        first = itemsize * (exact + rank * sum(rows for rows, _ in sides))
        second = itemsize * rank * sum(columns for _, columns in sides)
        return tuple(("all_reduce", size) for size in (first, second) if size)
    if compression.kind == "topk":
        return (("all_gather", ranks * largest(compression, elements) * (itemsize + PLACE_BYTES)),)
    size = ranks * code_bytes(compression, part_elements(compression, elements, ranks))
    return ("all_to_all", size), ("all_gather", size)


def scattered_messages(
    compression: Compression, shapes: Sequence[Shape], ranks: int, itemsize: int = 4
) -> tuple[Message, ...]:
    """Return the messages that reduce-scatter a flat gradient on `ranks` workers; arguments as in `whole_messages`."""
    if not shapes:
        return ()
    padded = [ceil(shape[0] / ranks) * ranks * prod(shape[1:]) for shape in shapes]
    if compression.kind == "powersgd":
        rank = int(compression.number)
        chosen = [is_factored(shape, rank) for shape in shapes]
        sides = [matrix(shape) for shape, factored in zip(shapes, chosen, strict=True) if factored]
        exact = sum(size for size, factored in zip(padded, chosen, strict=True) if not factored)
        found: list[Message] = []
        if sides:
            found += [("all_reduce", itemsize * rank * sum(side)) for side in zip(*sides, strict=True)]
        return (*found, ("reduce_scatter", itemsize * exact)) if exact else tuple(found)
    part = sum(padded) // ranks
    if compression.kind == "topk":
        return (("all_to_all", ranks * largest(compression, part) * (itemsize + PLACE_BYTES)),)
    return (("all_to_all", ranks * code_bytes(compression, part_elements(compression, part * ranks, ranks))),)


def error_elements(shapes: Sequence[Shape], ranks: int = 0) -> int:
    """Return the elements of a worker's errors for gradients of these shapes; `ranks` pads scattered ones."""
    if not ranks:
        return sum(map(prod, shapes))
    return sum(ceil(shape[0] / ranks) * ranks * prod(shape[1:]) for shape in shapes)


def start_elements(compression: Compression, shapes: Sequence[Shape]) -> int:
    """Return the elements of PowerSGD's factors Q, with which the next step begins."""
    if compression.kind != "powersgd":
        return 0
    rank = int(compression.number)
    return sum(rank * matrix(shape)[1] for shape in shapes if is_factored(shape, rank))
