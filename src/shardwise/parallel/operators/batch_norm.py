"""Batch normalisation over the samples of all replicas (torch's own exists on GPUs only).

Statistics are combined as in Chan, Golub and LeVeque (1979): every replica sends its count, mean and centred sum of
squares, so there is no cancellation. All replicas add them in the same order, so their running statistics stay
bit-identical.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.errors import WorkloadError
from shardwise.workload.precision import widened


def batch_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    group: dist.ProcessGroup | None,
    counted: bool = True,
) -> Tensor:
    """Compute `torch.nn.functional.batch_norm` in training, with the statistics of the whole `group`.

    Args:
        x: shape (samples, channels, ...).
        weight: shape (channels,), or None, like `bias`.
        bias: see `weight`.
        running_mean: updated in place, like `running_var` (with the unbiased variance), unless None.
        running_var: see `running_mean`.
        momentum: weight of the new statistics in the running ones.
        eps: added to the variance.
        group: the replicas; None for this worker alone.
        counted: whether the samples of `x` count; False for a dummy sample that only keeps the replica in step.

    Collective: all of `group` call it, and all of them run its backward pass.
    """
    weight, bias = widened((weight, bias))  # which `fully_shard` gathers in bfloat16; the statistics are float32
    output: Tensor = _BatchNorm.apply(  # type: ignore[no-untyped-call]
        x, weight, bias, running_mean, running_var, momentum, eps, group, counted
    )
    return output


class _BatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        group: dist.ProcessGroup | None,
        counted: bool,
    ) -> Tensor:
        count, mean, squares = _statistics(x, group, counted)
        var = squares / count.clamp(min=1)
        _update(running_mean, running_var, count, mean, squares, momentum)
        # with given statistics torch's own kernel normalises in one pass over the data
        output = torch.batch_norm(x, weight, bias, mean, var, False, 0.0, eps, False)
        ctx.save_for_backward(x, weight, mean, var, count)
        ctx.eps, ctx.group, ctx.counted = eps, group, counted
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():  # under create_graph=True; the sums over replicas below have no derivative
            raise WorkloadError(
                "a second derivative is taken through a batch norm (create_graph=True), which cannot be done over the "
                "samples of several replicas: use a norm of single samples (GroupNorm, LayerNorm), or one replica"
            )
        x, weight, mean, var, count = ctx.saved_tensors
        direct, by_weight, by_bias = _local_gradients(gradients[0].contiguous(), x, weight, mean, var, ctx.eps)
        sums = torch.stack([by_bias, by_weight])
        if ctx.group is not None:
            dist.all_reduce(sums, group=ctx.group)
        if ctx.counted:  # the statistics depend on x only if it counts
            inverse = torch.rsqrt(var + ctx.eps)
            factor = inverse if weight is None else inverse * weight.to(inverse.dtype)
            by_mean, by_var = sums / count.clamp(min=1) * factor
            slope = by_var * inverse
            shape = (1, -1, *(1,) * (x.dim() - 2))
            offset = (mean * slope - by_mean).view(shape)
            direct = direct.add_((offset - x * slope.view(shape)).to(direct.dtype))
        weight_gradient = None if weight is None else by_weight.to(weight.dtype)
        bias_gradient = by_bias if ctx.needs_input_grad[2] else None
        return direct, weight_gradient, bias_gradient, None, None, None, None, None, None


def _statistics(x: Tensor, group: dist.ProcessGroup | None, counted: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (count (), mean (channels,), centred sum of squares (channels,)) over the group, in float32 or wider."""
    wide = x if x.dtype in (torch.float32, torch.float64) else x.float()
    dims = [dim for dim in range(x.dim()) if dim != 1]
    var, mean = torch.var_mean(wide, dims, correction=0)
    number = x.numel() // x.size(1)
    local = torch.cat([mean, var * number, mean.new_full((1,), number)])
    if not counted:
        local = torch.zeros_like(local)
    if group is None:
        return local[-1], mean, local[mean.numel() : -1]
    parts = [torch.empty_like(local) for _ in range(group.size())]
    dist.all_gather(parts, local, group=group)
    return _combine(torch.stack(parts))


def _combine(parts: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Combine the replicas' statistics into one set, from shape (replicas, [means, squares, count])."""
    counts = parts[:, -1:]
    means, squares = parts[:, :-1].chunk(2, dim=1)
    count = counts.sum()
    mean = (means * counts).sum(0) / count.clamp(min=1)
    return count, mean, squares.sum(0) + (counts * (means - mean).square()).sum(0)


def _update(
    running_mean: Tensor | None,
    running_var: Tensor | None,
    count: Tensor,
    mean: Tensor,
    squares: Tensor,
    momentum: float,
) -> None:
    """Move the running statistics towards the new ones. Leaves them unchanged if no sample counts."""
    share = (count > 0).to(mean.dtype) * momentum
    if running_mean is not None:
        running_mean.lerp_(mean.to(running_mean.dtype), share.to(running_mean.dtype))
    if running_var is not None:
        unbiased = squares / (count - 1).clamp(min=1)
        running_var.lerp_(unbiased.to(running_var.dtype), share.to(running_var.dtype))


def _local_gradients(
    gradient: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, var: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute (gradient of x with fixed statistics, sum of gradient times normalised x, sum of gradient)."""
    ones = torch.ones_like(mean) if weight is None else weight
    direct, by_weight, by_bias = torch.ops.aten.native_batch_norm_backward(
        gradient, x, ones, mean, var, None, None, False, eps, [True, True, True]
    )
    return direct, by_weight.to(mean.dtype), by_bias.to(mean.dtype)
