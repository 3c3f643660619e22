"""Embedding and cross entropy with the vocabulary sharded over the tensor-parallel workers.

The logits are never gathered. Workers exchange the largest logit, the sum of exponentials and the target's logit per
position (Megatron-LM; Shoeybi et al. 2019, section 3), three numbers where gathering would send the vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass
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
    classes = Classes(exchange, dim, sum(spans), smoothing)
    losses: Tensor = _CrossEntropy.apply(classes, logits, local)  # type: ignore[no-untyped-call]
    losses = losses.masked_fill(~counted, 0.0).to(logits.dtype)
    if reduction == 0:
        return losses
    total = losses.sum()
    return total / counted.sum() if reduction == 1 else total


@dataclass(frozen=True, slots=True)
class Exponentials:
    """Cross entropy of each position with what its gradient needs, see `Classes.exponentials`.

    Attributes:
        losses: log sum exp(logits) - (1 - smoothing) target logit - smoothing * mean logit.
        each: exp(logit - largest logit) of this worker's classes.
        sums: their sums over the classes of all workers.
    """

    losses: Tensor
    each: Tensor
    sums: Tensor


@dataclass(frozen=True, slots=True)
class Classes:
    """Classes that workers share.

    Attributes:
        exchange: the exchanges among the workers; a single one has all classes.
        dim: their dimension in the logits.
        number: their number on all workers.
        smoothing: share of the target spread evenly over all of them.
    """

    exchange: Exchange
    dim: int
    number: int
    smoothing: float

    def exponentials(self, logits: Tensor, local: Tensor) -> Exponentials:
        """Compute the cross entropy of each position without autograd, in float32, or in float64 as the logits.

        Args:
            logits: logits of this worker's classes.
            local: local index of each target; -1 where another worker has it.
        """
        largest = logits.amax(self.dim)
        largest = largest if largest.dtype == torch.float64 else largest.float()
        if self._several:
            largest = self.exchange.summed(largest, dist.ReduceOp.MAX)
        each = logits - largest.unsqueeze(self.dim)
        own = each.gather(self.dim, self._at(local)).squeeze(self.dim)
        parts = [own.masked_fill(local < 0, 0.0) if self._several else own]
        if self.smoothing:
            parts.append(each.sum(self.dim))
        parts.append(each.exp_().sum(self.dim))
        if self._several:
            parts = list(self.exchange.summed(torch.stack(parts)))
        sums = parts[-1]
        if not self.smoothing:
            return Exponentials(sums.log() - parts[0], each, sums)
        losses = sums.log() - (1 - self.smoothing) * parts[0] - self.smoothing / self.number * parts[1]
        return Exponentials(losses, each, sums)

    def gradient(self, found: Exponentials, local: Tensor, gradients: Tensor, dtype: torch.dtype) -> Tensor:
        """Compute the gradient of the logits in `dtype` from the `gradients` of the losses; overwrites `found.each`."""
        each, hit = found.each, found.sums * (self.smoothing - 1)
        if self._several:
            hit = hit.masked_fill(local < 0, 0.0)
        each.scatter_add_(self.dim, self._at(local), hit.unsqueeze(self.dim))
        if self.smoothing:
            each -= (found.sums * (self.smoothing / self.number)).unsqueeze(self.dim)
        into = each if dtype == each.dtype else torch.empty_like(each, dtype=dtype)
        return torch.mul(each, (gradients / found.sums).unsqueeze(self.dim), out=into)

    @property
    def _several(self) -> bool:
        return self.exchange.ranks > 1

    def _at(self, local: Tensor) -> Tensor:
        """Return the index of each target along the classes; any class where another worker has it."""
        return (local.clamp(min=0) if self._several else local).unsqueeze(self.dim)


class _CrossEntropy(torch.autograd.Function):
    """The losses of `Classes.exponentials`."""

    @staticmethod
    def forward(ctx: Any, classes: Classes, logits: Tensor, local: Tensor) -> Tensor:
        found = classes.exponentials(logits, local)
        ctx.save_for_backward(found.each, found.sums, local)
        ctx.classes, ctx.dtype = classes, logits.dtype
        return found.losses

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        each, sums, local = ctx.saved_tensors
        found = Exponentials(gradients[0], each.clone(), sums)
        return None, ctx.classes.gradient(found, local, gradients[0], ctx.dtype), None
