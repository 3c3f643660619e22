"""Output layer and cross entropy computed in pieces of the tokens, with their gradients, in the forward pass.

The logits of a large vocabulary, their float32 copy and their gradient are the largest tensors of a step. Here those of
one piece of the tokens exist at a time: what remains of a piece are its losses, the gradient of its inputs, and its
summand of the gradient of the weight (Hsu et al. 2024, Liger Kernel, section 3.2). Nothing is computed twice: the
backward pass only multiplies the gradients by that of the loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from shardwise.parallel.tensor.communication import Exchange, Segments
from shardwise.parallel.tensor.vocab_parallel import Classes, local_index

MEAN = 1
"""Number that torch gives `reduction="mean"`; 2 is the sum."""


class OutputLayer(NamedTuple):
    """Inputs of an output layer, and its parameters on this worker.

    Attributes:
        x: inputs, shape (..., features).
        weight: weight, shape (classes / ranks, features).
        bias: bias; None if it has none.
    """

    x: Tensor
    weight: Tensor
    bias: Tensor | None


class LossKind(NamedTuple):
    """Options of a cross entropy.

    Attributes:
        reduction: 1 mean over the targets that are not ignored, 2 sum.
        ignored: the target value that is ignored.
        smoothing: share of the target spread evenly over all classes.
    """

    reduction: int
    ignored: int
    smoothing: float


@dataclass(frozen=True, slots=True)
class LossGradients:
    """A loss and its gradients.

    Attributes:
        loss: the loss, 0-d, in float32 or float64.
        x: gradient of the inputs of the output layer; None if it is not wanted.
        weight: gradient of its weight, at least in float32; None if it is not wanted.
        bias: gradient of its bias, likewise.
    """

    loss: Tensor
    x: Tensor | None
    weight: Tensor | None
    bias: Tensor | None


@torch.no_grad()
def loss_and_gradients(
    exchange: Exchange,
    spans: Segments,
    pieces: int,
    layer: OutputLayer,
    target: Tensor,
    kind: LossKind,
    wanted: Sequence[bool],
) -> LossGradients:
    """Compute the cross entropy of an output layer and its gradients in pieces of the tokens.

    Args:
        exchange: the exchanges among the workers that share the vocabulary; a single one has all of it.
        spans: spans of the classes.
        pieces: number of pieces; each has as many tokens, the last one maybe fewer.
        layer: the output layer.
        target: class indices, shape of the inputs without the features.
        kind: options of the cross entropy.
        wanted: whether the gradient of each tensor of the layer is wanted.
    """
    x, weight, bias = layer
    rows, labels = x.reshape(-1, x.shape[-1]), target.reshape(-1)
    ignored = labels == kind.ignored
    local = labels.masked_fill(ignored, 0)
    local = local_index(exchange, spans, local) if exchange.ranks > 1 else local
    wide = torch.float64 if x.dtype == torch.float64 else torch.float32
    counted = (~ignored).to(wide)
    number = counted.sum() if kind.reduction == MEAN else None
    each = counted if number is None else (counted / number).masked_fill_(ignored, 0.0)  # all ignored: no 0 / 0
    classes = Classes(exchange, 1, sum(spans), kind.smoothing)
    to_x = rows.new_empty(rows.shape) if wanted[0] else None
    to_weight = to_bias = None
    losses: list[Tensor] = []
    parts = [whole.chunk(pieces) for whole in (rows, local, each, rows if to_x is None else to_x)]
    for piece, here, gradients, into in zip(*parts, strict=True):
        found = classes.exponentials(F.linear(piece, weight, bias), here)
        losses.append(found.losses)
        if not any(wanted):
            continue
        gradient = classes.gradient(found, here, gradients, x.dtype)
        del found
        if wanted[0]:
            torch.mm(gradient, weight, out=into)
        if wanted[1]:
            to_weight = _plus_product(to_weight, gradient, piece, wide)
        if wanted[2]:
            summand = gradient.sum(0, dtype=wide)
            to_bias = summand if to_bias is None else to_bias.add_(summand)
        del gradient
    total = torch.cat(losses).masked_fill_(ignored, 0.0).sum()
    return LossGradients(
        total if number is None else total / number, None if to_x is None else to_x.view(x.shape), to_weight, to_bias
    )


def _plus_product(total: Tensor | None, gradient: Tensor, x: Tensor, wide: torch.dtype) -> Tensor:
    """Add the gradient of the weight of one piece to that of the pieces before it, in `wide`, and return the sum."""
    if total is None:
        return (gradient.t() @ x).to(wide)
    if x.dtype == wide:
        return total.addmm_(gradient.t(), x)
    return total.add_(gradient.t() @ x)


def with_gradients(found: LossGradients, layer: OutputLayer, dtype: torch.dtype) -> Tensor:
    """Return the loss in `dtype` as a function of the tensors of its output layer, whose gradients are known.

    One backward pass can run through it: it changes the gradients.
    """
    loss: Tensor = _Known.apply(found, *layer)  # type: ignore[no-untyped-call]
    return loss.to(dtype)


class _Known(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, found: LossGradients, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(found.x, found.weight, found.bias)
        ctx.dtypes = tuple(None if each is None else each.dtype for each in (x, weight, bias))
        return found.loss.detach()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        known = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        return None, *(None if each is None else each.mul_(gradients[0]).to(dtype) for each, dtype in known)
