"""Batch norm over the samples of all ranks, on CPUs and GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from shardwise.compat.horovod.operations import Sum, allreduce
from shardwise.compat.horovod.world import is_initialized, size


class SyncBatchNorm(_BatchNorm):
    """Batch norm whose mean and variance are those of the samples of all ranks; arguments as in torch's BatchNorm."""

    def _check_input_dim(self, input: Tensor) -> None:  # noqa: A002  torch's name
        if input.dim() < 2:
            raise ValueError(f"SyncBatchNorm needs an input of 2 dimensions or more, this one has {input.dim()}")

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002  torch's name
        """Normalize a batch; in training by the statistics of all ranks, which must all call this."""
        self._check_input_dim(input)
        if not (self.training or self.running_mean is None) or not is_initialized() or size() == 1:
            return super().forward(input)
        mean, variance, count = _moments(input)
        if self.training and self.running_mean is not None and self.running_var is not None:
            self._follow(mean.detach(), variance.detach(), float(count))
        shape = [1, -1] + [1] * (input.dim() - 2)
        normal = (input - mean.view(shape)) * torch.rsqrt(variance.view(shape) + self.eps)
        if self.weight is not None:
            normal = normal * self.weight.view(shape) + self.bias.view(shape)
        return normal.to(input.dtype)

    def _follow(self, mean: Tensor, variance: Tensor, count: float) -> None:
        """Move the running statistics, which hold the unbiased variance, towards those of this batch."""
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = 1 / float(self.num_batches_tracked) if self.momentum is None else self.momentum
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_((variance * count / max(count - 1, 1)).to(self.running_var.dtype), factor)


def _moments(batch: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean and variance of each channel over all ranks, and the number of values of each; gradients pass."""
    dims = [0, *range(2, batch.dim())]
    wide = batch.float() if batch.dtype in (torch.float16, torch.bfloat16) else batch
    count = torch.tensor([batch.numel() / max(batch.shape[1], 1)], dtype=wide.dtype, device=batch.device)
    total = allreduce(F.pad(wide.sum(dims), (0, 1)) + F.pad(count, (batch.shape[1], 0)), op=Sum)
    mean = total[:-1] / total[-1]
    shape = [1, -1] + [1] * (batch.dim() - 2)
    variance = allreduce((wide - mean.view(shape)).square().sum(dims), op=Sum) / total[-1]
    return mean, variance, total[-1].detach()
