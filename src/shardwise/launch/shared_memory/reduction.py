"""Reductions of tensors, in the order of their ranks: the result is the same wherever it is computed."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ReduceOp

_OPERATORS: dict[ReduceOp.RedOpType, Callable[..., Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.AVG: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MIN: torch.minimum,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.BAND: torch.bitwise_and,
    ReduceOp.BOR: torch.bitwise_or,
    ReduceOp.BXOR: torch.bitwise_xor,
}

_ROUNDING = (ReduceOp.SUM, ReduceOp.AVG, ReduceOp.PRODUCT)
"""Operations that round, so that narrow floats are combined in float32 and rounded once."""

_NARROW = (torch.float16, torch.bfloat16)


class Reduction:
    """Operation by which the tensors of several workers become one.

    Raises:
        ValueError: torch has the operation for other backends only.
    """

    def __init__(self, asked: ReduceOp | ReduceOp.RedOpType) -> None:
        self._kind = getattr(asked, "op", asked)
        if self._kind not in _OPERATORS:
            raise ValueError(f"{asked} is not possible between the workers of one host")
        self._operator = _OPERATORS[self._kind]

    def combine(self, parts: Sequence[Tensor], out: Tensor) -> None:
        """Write to `out` what the parts become, which are in the order of ranks; `out` may be one of them."""
        if len(parts) == 1:
            out.copy_(parts[0])
        elif len(parts) == 2:
            self._operator(parts[0], parts[1], out=out)
        else:
            wide = out.dtype in _NARROW and self._kind in _ROUNDING
            total = self._operator(parts[0].float() if wide else parts[0], parts[1])
            for part in parts[2:-1]:
                self._operator(total, part, out=total)
            if wide:
                out.copy_(self._mean(self._operator(total, parts[-1], out=total), len(parts)))
                return
            self._operator(total, parts[-1], out=out)
        self._mean(out, len(parts))

    def _mean(self, total: Tensor, count: int) -> Tensor:
        """Divide a sum in place by the number of its parts, if their mean is asked for."""
        if self._kind != ReduceOp.AVG:
            return total
        return total.div_(count) if total.is_floating_point() else total.div_(count, rounding_mode="trunc")
