"""One kernel: what a device is asked to compute, without how long that takes."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.strategy import PRODUCTS

KINDS = ("matmul", "attention", "convolution", "memory")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A call of one operation on one device.

    Attributes:
        operation: for people and for grouping, for example `aten.mm`; of attention that is not causal it begins
            with `dense`.
            An elementwise operation on short rows begins with `rows` (see `predict.counting`).
        kind: one of KINDS; `memory` is everything that only moves and combines values: elementwise, norms, softmax,
            embeddings, copies, optimizers.
        dtype: one of `cluster.DTYPES`, of what is multiplied.
        flops: floating point operations, a multiply-add counted as two; causal attention counted in full.
        bytes: read and written.
        shape: matmul (batch, m, n, k): batch times (m x k) @ (k x n); attention (batch, heads, queries, keys, head
            size); convolution (batch, channels in / groups, channels out, positions of the window, window size);
            memory (elements,).
        backward: whether it belongs to the backward pass; attention and convolution run other kernels there.
        count: equal kernels after each other.
        when: `forward`, `backward`, `recompute` or `optimizer` (with clipping and norms), where it was recorded.
    """

    operation: str
    kind: str
    dtype: str
    flops: float
    bytes: float
    shape: tuple[int, ...] = ()
    backward: bool = False
    count: int = 1
    when: str = ""

    @property
    def product(self) -> bool:
        """Whether its result stays where the rest of a block is computed again, see `strategy.PRODUCTS`."""
        return self.operation.rpartition(" ")[2] in PRODUCTS
