"""Embedding and cross entropy with the vocabulary sharded over the tensor-parallel workers.

The logits are never gathered. Workers exchange the largest logit, the sum of exponentials and the target's logit per
position (Megatron-LM; Shoeybi et al. 2019, section 3), three numbers where gathering would send the vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.tensor.communication import Exchange, Segments


def local_index(exchange: Exchange, spans: Segments, index: Tensor) -> Tensor:
    """Convert a global `index` along a dimension cut into `spans` to this worker's local index.

    Returns -1 where another worker has it.
    """
    if len(spans) == 1:
        part = spans[0] // exchange.ranks
        local = index - exchange.rank * part
        return local.masked_fill((local < 0) | (local >= part), -1)
    here = exchange.cut(torch.arange(sum(spans), device=index.device), 0, spans)
    table = torch.full((sum(spans),), -1, device=index.device)
    table[here] = torch.arange(here.numel(), device=index.device)
    return table[index.clamp(0, sum(spans) - 1)]


def embedding(exchange: Exchange, weight: Tensor, index: Tensor, padding: int, spans: Segments) -> Tensor:
    """Compute this worker's summand of an embedding: rows that it does not hold are zero.

    Args:
        exchange: the exchanges among the workers.
        weight: this worker's rows, shape (vocabulary / ranks, features).
        index: word indices, any shape.
        padding: the word whose row gets no gradient; -1 for none.
        spans: spans of the vocabulary.

    Returns:
        the summand, shape (*index.shape, features).
    """
    local = local_index(exchange, spans, index)
    missing = (local < 0).unsqueeze(-1)
    rows = F.embedding(local.clamp(min=0), weight)
    if padding >= 0:
        rows = torch.where((index == padding).unsqueeze(-1), rows.detach(), rows)
    return rows.masked_fill(missing, 0.0)


def cross_entropy(
    exchange: Exchange,
    logits: Tensor,
    target: Tensor,
    spans: Segments,
    reduction: int,
    ignore: int,
    smoothing: float,
) -> Tensor:
    """Compute `torch.nn.functional.cross_entropy` of class indices, with the classes sharded over the workers.

    Args:
        exchange: the exchanges among the workers.
        logits: this worker's classes, shape (samples, classes / ranks, ...) or (classes / ranks,).
        target: class indices, shape of `logits` without the class dimension.
        spans: spans of the classes.
        reduction: 0 none, 1 mean over the targets that are not ignored, 2 sum.
        ignore: the target value that is ignored.
        smoothing: share of the target spread evenly over all classes.

    Returns:
        the loss, replicated.
    """
    dim = 1 if logits.dim() > 1 else 0
    counted = target != ignore
    local = local_index(exchange, spans, target.masked_fill(~counted, 0))
    losses: Tensor = _CrossEntropy.apply(exchange, logits, local, dim, sum(spans), smoothing)  # type: ignore[no-untyped-call]
    losses = losses.masked_fill(~counted, 0.0).to(logits.dtype)
    if reduction == 0:
        return losses
    total = losses.sum()
    return total / counted.sum() if reduction == 1 else total


class _CrossEntropy(torch.autograd.Function):
    """Per position: log sum exp(logits) - (1 - smoothing) target logit - smoothing * mean logit."""

    @staticmethod
    def forward(
        ctx: Any, exchange: Exchange, logits: Tensor, local: Tensor, dim: int, classes: int, smoothing: float
    ) -> Tensor:
        wide = logits if logits.dtype in (torch.float32, torch.float64) else logits.float()
        largest = exchange.summed(wide.amax(dim), dist.ReduceOp.MAX)
        shifted = wide - largest.unsqueeze(dim)
        here = local.clamp(min=0).unsqueeze(dim)
        mine = shifted.gather(dim, here).squeeze(dim).masked_fill(local < 0, 0.0)
        parts = [shifted.exp().sum(dim), mine]
        if smoothing:
            parts.append(shifted.sum(dim))
        sums = exchange.summed(torch.stack(parts))
        log_sum = sums[0].log()
        ctx.save_for_backward(shifted.sub_(log_sum.unsqueeze(dim)).exp_(), local)
        ctx.dim, ctx.classes, ctx.smoothing, ctx.dtype = dim, classes, smoothing, logits.dtype
        losses = log_sum - (1 - smoothing) * sums[1]
        return losses - smoothing / classes * sums[2] if smoothing else losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        probabilities, local = ctx.saved_tensors
        gradient = probabilities.clone()
        hit = ((local >= 0).to(gradient.dtype) * (1 - ctx.smoothing)).unsqueeze(ctx.dim)
        gradient.scatter_add_(ctx.dim, local.clamp(min=0).unsqueeze(ctx.dim), -hit)
        if ctx.smoothing:
            gradient -= ctx.smoothing / ctx.classes
        return None, gradient.mul_(gradients[0].unsqueeze(ctx.dim)).to(ctx.dtype), None, None, None, None
