"""Grouped products (the experts of a mixture) on tensors without data, in every dtype that torch multiplies.

`torch._grouped_mm` takes float32 and float16 too, on hosts and on GPUs, but the function that tells the shape of its
result refuses all but bfloat16. This is the one place that reaches into it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
from torch import Tensor, _meta_registrations

_SHAPES: Any = _meta_registrations


@cache
def widen_grouped_products() -> None:
    """From now on a grouped product of any floating dtype has a shape; what else is wrong is refused still."""
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
