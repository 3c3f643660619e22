"""Make a step that is traced on the CPU run the operations that a GPU would run.

rms_norm    one kernel per direction, where the CPU runs about ten, each of which saves a tensor for the backward pass
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

aten = torch.ops.aten


def on_gpu(target: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function that runs a graph's call target as a GPU would, on tensors without data.

    A target that is not an ATen overload is returned unchanged.
    """
    if not isinstance(target, torch._ops.OpOverload):
        return target
    return _rms_norm if target.overloadpacket is aten.rms_norm else target


class GPUDispatch(TorchFunctionMode):
    """Mode under which everything called runs as a GPU would run it.

    ATen overloads go through `on_gpu`; functions of torch's Python API are matched by name.
    """

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if isinstance(function, torch._ops.OpOverload):
            return on_gpu(function)(*args, **kwargs)
        name = getattr(function, "__name__", "").strip("_")
        return (_rms_norm if name == "rms_norm" else function)(*args, **kwargs)


def _rms_norm(x: Tensor, shape: list[int], weight: Tensor | None = None, eps: float | None = None) -> Tensor:
    output: Tensor = _RMSNorm.apply(x, weight, shape, eps)  # type: ignore[no-untyped-call]
    return output


class _RMSNorm(torch.autograd.Function):
    """RMS norm by torch's fused kernels, one forward and one backward.

    torch implements these kernels for CUDA only. On tensors without data it derives the shapes of their results from
    the operation's decomposition, so that they can be called here too.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, shape: list[int], eps: float | None) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            output, scale = aten._fused_rms_norm.default(x, shape, weight, eps)
        ctx.save_for_backward(x, weight, scale)
        ctx.shape = shape
        result: Tensor = output
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, weight, scale = ctx.saved_tensors
        mask = [ctx.needs_input_grad[0], weight is not None and ctx.needs_input_grad[1]]
        with torch._C._AutoDispatchBelowAutograd():
            for_x, for_weight = aten._fused_rms_norm_backward.default(gradient, x, ctx.shape, scale, weight, mask)
        return for_x if mask[0] else None, for_weight if mask[1] else None, None, None
