"""Description of one kernel: its operation, FLOPs, bytes and shape, without its time."""

from __future__ import annotations

from dataclasses import dataclass

from shardwise.strategy import PRODUCTS

KINDS = ("matmul", "attention", "convolution", "memory")


@dataclass(frozen=True, slots=True)
class Kernel:
    """A call of one operation on one device.

    Attributes:
        operation: name of the operation, for display and for grouping, for example `aten.mm`. The prefix `dense` marks
            attention that is not causal, the prefix `rows` an elementwise operation on short rows (see
            `predict.profile.op_counter`).
        kind: one of KINDS; `memory` is everything that only moves and combines values: elementwise, norms, softmax,
            embeddings, copies, optimizers.
        dtype: data type of the operands, one of `cluster.DTYPES`.
        flops: floating point operations, a multiply-add counted as two; causal attention counted in full.
        bytes: bytes read and written.
        shape: matmul (batch, m, n, k): batch times (m x k) @ (k x n); attention (batch, heads, queries, keys, head
            size); convolution (batch, channels in / groups, channels out, positions of the window, window size);
            memory (elements,).
        backward: whether it belongs to the backward pass; attention and convolution run other kernels there.
        count: number of equal kernels in succession. `flops` and `bytes` are those of one of them.
        when: phase in which it was recorded: `forward`, `backward`, `recompute` or `optimizer` (which includes
            clipping and norms); empty if none was recorded.
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
        """Return whether selective recomputation keeps its result instead of recomputing it: `strategy.PRODUCTS`."""
        return self.operation.rpartition(" ")[2] in PRODUCTS
