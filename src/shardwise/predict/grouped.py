"""Let grouped matmuls (mixture of experts) run on tensors without data in every dtype that torch multiplies.

`torch._grouped_mm` accepts float32 and float16 too, on CPUs and GPUs, but its meta kernel, which computes the shape of
the result, rejects all dtypes but bfloat16. This module alone patches that kernel.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, _meta_registrations

_SHAPES: Any = _meta_registrations


@cache
def widen_grouped_products() -> None:
    """Patch torch's meta kernel of grouped matmuls to accept any floating dtype, for the rest of the process.

    All other checks of the kernel stay in force. Repeated calls have no effect.
    """
    refusing = _SHAPES._meta_grouped_mm_common

    def shape_of(mat_a: Tensor, mat_b: Tensor, scale_a: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        dtype = mat_a.dtype
        if scale_a is not None or dtype != mat_b.dtype or dtype == torch.bfloat16 or not dtype.is_floating_point:
            return refusing(mat_a, mat_b, scale_a, *args, **kwargs)  # type: ignore[no-any-return]
        narrow = mat_a.to(torch.bfloat16), mat_b.to(torch.bfloat16)
        if kwargs.get("out_dtype") == dtype:
            kwargs["out_dtype"] = None
        return refusing(*narrow, scale_a, *args, **kwargs).to(dtype)  # type: ignore[no-any-return]

    _SHAPES._meta_grouped_mm_common = shape_of
