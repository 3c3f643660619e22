"""Sizes of the kernels to measure on a kind of device: a kernel that fills a CPU for milliseconds takes a GPU no time.

The sizes of a CPU are those of the recipes. The sizes of a GPU reach from kernels that are over before the next one is
launched to those of models of some billion parameters, beyond which a kernel's rate no longer depends on its size.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from math import prod

Product = tuple[int, int, int]
"""Rows, columns and summed dimension of a matmul: (m x k) @ (k x n) as (m, n, k)."""

Convolution = tuple[int, int, int, int, int, int]
"""Dimensions, batch, channels in, channels out, side of the input, side of the window.

The side of a transposed convolution is that of its smaller input.
"""


@dataclass(frozen=True, slots=True)
class KernelSizes:
    """KernelSizes of the measured kernels.

    Attributes:
        elements: elements in the results of memory-bound kernels.
        width: features in a row, for operations on rows.
        channels: channels of batch and group norms.
        vocabulary: rows of a table of embeddings.
        products: matmuls of single matrices.
        batched: matmuls of batches of matrices: (batch, m, n, k).
        convolutions: convolutions of a batch.
        single: convolutions of one small sample, which torch computes with other code on a CPU; float32 only.
        transposed: transposed convolutions.
        attentions: attention: (batch, heads, sequence length of queries and keys, head size).
    """

    elements: tuple[int, ...]
    width: int
    channels: int
    vocabulary: int
    products: tuple[Product, ...]
    batched: tuple[tuple[int, int, int, int], ...]
    convolutions: tuple[Convolution, ...]
    single: tuple[Convolution, ...]
    transposed: tuple[Convolution, ...]
    attentions: tuple[tuple[int, int, int, int], ...]


def _grid(rows: Sequence[int], sides: Sequence[int], most: int) -> Iterator[Product]:
    """Yield all matmuls with these numbers of rows and these other sizes that have at most `most` multiply-adds."""
    return ((m, n, k) for m, n, k in product(rows, sides, sides) if prod((m, n, k)) <= most)


CPU = KernelSizes(
    elements=(64, 4096, 32768, 262144, 2097152),
    width=128,
    channels=8,
    vocabulary=1024,
    products=(
        *_grid((16, 64, 256, 1024, 4096), (16, 64, 256, 1024), 2**27),
        *((8, 8, 8), (64, 10, 64), (128, 384, 128), (2048, 352, 128), (128, 128, 2048), (512, 512, 512)),
    ),
    batched=((8, 16, 16, 16), (64, 64, 64, 16), (64, 128, 128, 32), (16, 256, 64, 256)),
    convolutions=(
        *((2, batch, c, d, side, 3) for batch, side in ((64, 8), (16, 32)) for c, d in ((1, 16), (16, 32), (32, 32))),
        *((2, batch, c, d, side, 3) for batch, side in ((16, 8), (4, 32)) for c, d in ((64, 64), (128, 128))),
        *((2, batch, c, d, side, 1) for batch, side in ((64, 8), (16, 32)) for c, d in ((16, 32), (64, 64))),
        *((2, batch, c, d, side, 2) for batch, side in ((64, 8), (16, 32)) for c, d in ((3, 64), (32, 64))),
        *((2, 16, c, d, side, 3) for side in (8, 16) for c, d in ((3, 16), (32, 16), (32, 64), (64, 32), (64, 128))),
        (2, 4, 3, 32, 64, 7),
        *((3, batch, c, d, side, 3) for batch, side in ((8, 6), (4, 12)) for c, d in ((8, 16), (16, 16), (32, 32))),
        *((3, 4, c, d, side, 3) for side in (6, 12) for c, d in ((16, 8), (16, 32), (32, 16), (32, 64), (64, 32))),
        *((3, batch, c, d, 24, 3) for batch in (2, 8) for c, d in ((1, 8), (8, 8), (16, 8))),
        *(
            (3, 4, c, d, side, 3) for c, d, side in ((8, 4, 24), (16, 4, 24), (8, 8, 12))
        ),  # fewer channels than SIMD lanes
        *((3, batch, c, d, side, 2) for batch, side in ((8, 12), (4, 24)) for c, d in ((8, 8), (16, 32))),
        *((3, batch, c, d, side, 1) for batch, side in ((8, 12), (4, 24)) for c, d in ((8, 3), (16, 16))),
    ),
    single=(
        *((3, 1, c, d, side, 3) for side in (6, 12) for c, d in ((8, 16), (16, 16), (32, 32))),
        *((3, 1, c, d, 24, 3) for c, d in ((1, 8), (8, 8), (16, 8))),
        *((3, 1, c, d, side, 2) for c, d, side in ((8, 8, 24), (8, 16, 12), (16, 32, 12))),
        *((3, 1, c, d, side, 1) for c, d, side in ((8, 3, 24), (16, 16, 12))),
        *((2, 1, c, d, side, 3) for c, d, side in ((1, 16, 32), (16, 32, 32), (16, 32, 8), (64, 64, 8))),
        *((2, 1, c, d, side, 1) for c, d, side in ((16, 32, 32), (64, 64, 8))),
    ),
    transposed=(
        (2, 16, 64, 32, 16, 2),
        (3, 8, 32, 16, 6, 2),
        (3, 8, 16, 8, 12, 2),
    ),
    attentions=(
        (8, 4, 16, 16),
        (64, 4, 16, 16),
        (16, 4, 64, 32),
        (4, 4, 128, 32),
        (16, 4, 128, 32),
        (8, 8, 128, 64),
        (4, 4, 256, 64),
        (2, 4, 512, 64),
    ),
)


GPU = KernelSizes(
    elements=(64, 2**12, 2**15, 2**18, 2**20, 2**22, 2**24, 2**25, 2**26),
    width=1024,
    channels=64,
    vocabulary=32768,
    products=(
        *_grid((64, 256, 1024, 4096, 16384), (64, 256, 1024, 4096, 16384), 2**36),
        *_grid((512, 2048, 8192), (512, 2048, 8192), 2**37),
        *((16, 16, 16), (64, 10, 64), (8192, 32768, 1024), (1024, 32768, 8192), (8192, 1024, 32768)),
    ),
    batched=((8, 16, 16, 16), (64, 128, 128, 32), (96, 1024, 1024, 64), (96, 1024, 64, 1024), (32, 512, 512, 128)),
    convolutions=(
        *((2, batch, c, c, side, 3) for batch in (8, 64) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
        *((2, 64, c, 4 * c, side, 1) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
        *((2, 64, 4 * c, c, side, 1) for c, side in ((64, 56), (128, 28), (256, 14), (512, 7))),
        *((2, 16, c, d, side, 3) for c, d, side in ((3, 16, 32), (16, 32, 32), (64, 64, 8), (64, 128, 16))),
        *((2, 64, 3, 64, 112, 7), (2, 64, 3, 64, 8, 2), (2, 64, 64, 128, 32, 2), (2, 64, 16, 32, 8, 1)),
        *((3, 8, c, d, side, 3) for c, d, side in ((1, 8, 24), (8, 8, 24), (8, 16, 12), (16, 32, 6), (32, 32, 6))),
        *((3, 2, c, d, side, 3) for c, d, side in ((1, 32, 64), (32, 32, 64), (64, 64, 32), (128, 128, 16))),
        *((3, 8, 8, 16, 24, 2), (3, 2, 32, 64, 64, 2), (3, 8, 8, 3, 24, 1), (3, 2, 32, 4, 64, 1)),
    ),
    single=(),
    transposed=(
        *((2, 16, 64, 32, 16, 2), (2, 16, 256, 128, 28, 2)),
        *((3, 8, 32, 16, 6, 2), (3, 8, 16, 8, 12, 2), (3, 2, 64, 32, 32, 2)),
    ),
    attentions=(
        *((64, 4, 16, 16), (16, 4, 128, 32), (8, 8, 128, 64), (8, 12, 512, 64), (32, 12, 192, 64)),
        *((8, 12, 1024, 64), (4, 16, 2048, 64), (2, 16, 4096, 64)),
        *((4, 32, 512, 128), (2, 32, 2048, 128), (1, 32, 4096, 128)),
    ),
)
