"""Weight gradients computed apart from input gradients, so that a zero-bubble pipeline can fill its bubbles.

While a backward pass is split, linear layers and convolutions compute the gradient of their input at once and save what
the gradient of their weight needs for later (Qi et al. 2023, section 2). All other operations compute both gradients at
once.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

aten = torch.ops.aten
CONVOLUTIONS = (
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
    aten.conv_transpose1d.default,
    aten.conv_transpose2d.input,
    aten.conv_transpose3d.input,
)
Key = tuple[int, int]


class WeightGradients:
    """Store of deferred weight-gradient computations, by (stage, microbatch)."""

    def __init__(self) -> None:
        self._open: Key | None = None
        self._pending: dict[Key, list[Callable[[], None]]] = {}

    @property
    def deferring(self) -> bool:
        """Return whether the running backward pass defers its weight gradients."""
        return self._open is not None

    def begin(self, key: Key | None) -> None:
        """Defer weight gradients under `key` from here on. None computes them at once."""
        self._open = key

    def defer(self, work: Callable[[], None]) -> None:
        """Defer one computation under the key that `begin` set."""
        assert self._open is not None
        self._pending.setdefault(self._open, []).append(work)

    def compute(self, key: Key) -> None:
        """Run the computations deferred under `key`, without autograd."""
        with torch.no_grad():
            for work in self._pending.pop(key, []):
                work()

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Compute `torch.nn.functional.linear`, with weight and bias gradients that can be deferred."""
        output: Tensor = _Linear.apply(self, x, weight, bias)  # type: ignore[no-untyped-call]
        return output

    def convolution(
        self,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        stride: list[int],
        padding: list[int],
        dilation: list[int],
        transposed: bool,
        output_padding: list[int],
        groups: int,
    ) -> Tensor:
        """Compute `torch.convolution`, with weight and bias gradients that can be deferred."""
        options = (stride, padding, dilation, transposed, output_padding, groups)
        output: Tensor = _Convolution.apply(self, x, weight, bias, options)  # type: ignore[no-untyped-call]
        return output


def defer_weights(graph: fx.Graph, store: WeightGradients, tensors: Collection[str]) -> None:
    """Make the linear layers and convolutions of a graph able to defer the gradients of their weights.

    Replaces them in place, if weight and bias are placeholders named in `tensors`.
    """
    for node in graph.nodes:
        if node.op != "call_function" or len(node.args) < 2 or not _is_tensor(node.args[1], tensors):
            continue
        bias = node.args[2] if len(node.args) > 2 else None
        if bias is not None and not _is_tensor(bias, tensors):
            continue
        if node.target is aten.linear.default:
            node.target = store.linear
        elif node.target in CONVOLUTIONS and not isinstance((*node.args, None, None, None)[4], str):
            node.args = _convolution_arguments(node)
            node.target = store.convolution


def _is_tensor(argument: Any, tensors: Collection[str]) -> bool:
    return isinstance(argument, fx.Node) and argument.op == "placeholder" and argument.name in tensors


def _convolution_arguments(node: fx.Node) -> tuple[Any, ...]:
    """Convert the arguments of a conv1d, 2d or 3d call, or of a transposed one, to those of `torch.convolution`."""
    transposed = "transpose" in str(node.target)
    space = len(node.args[1].meta["shape"]) - 2  # type: ignore[union-attr]
    defaults: tuple[Any, ...] = (None, 1, 0, 0, 1, 1) if transposed else (None, 1, 0, 1, 1)
    given: tuple[Any, ...] = (*node.args, *defaults[len(node.args) - 2 :])
    x, weight, bias, stride, padding, *rest = given
    output_padding, groups, dilation = rest if transposed else (0, rest[1], rest[0])

    def each(value: Any) -> list[Any]:
        values = list(value) if isinstance(value, (list, tuple)) else [value]
        return values * space if len(values) == 1 else values

    return x, weight, bias, each(stride), each(padding), each(dilation), transposed, each(output_padding), groups


def _leaf(tensor: Tensor) -> Tensor | None:
    """Return the leaf that a tensor is or is a copy of, see `workload.precision.Copies`. Returns None if neither."""
    found = getattr(tensor, "copied_from", tensor)
    return found if found.is_leaf else None


def accumulate(parameter: Tensor, gradient: Tensor) -> None:
    """Add a gradient to `parameter.grad` as autograd does, in the parameter's dtype."""
    if parameter.grad is None:
        parameter.grad = gradient.to(parameter.dtype)
    else:
        parameter.grad += gradient


def gradient_of_weight(gradient: Tensor, x: Tensor) -> Tensor:
    """Compute the gradient of a linear layer's weight from that of its output and from its input `x`."""
    flat = gradient.flatten(0, -2) if gradient.dim() > 2 else gradient.view(-1, gradient.size(-1))
    weights: Tensor = flat.t() @ x.reshape(-1, x.size(-1)).to(flat.dtype)
    return weights


def gradient_of_bias(gradient: Tensor) -> Tensor:
    """Compute the gradient of a linear layer's bias from that of its output."""
    return gradient.sum(tuple(range(gradient.dim() - 1)))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, store: WeightGradients, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        output = F.linear(x, weight, bias)
        ctx.save_for_backward(x, weight)
        ctx.store, ctx.weight, ctx.bias = store, weight, bias
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        gradient, bias = gradients[0], ctx.bias
        to_x = (gradient @ weight.to(gradient.dtype)).to(x.dtype) if ctx.needs_input_grad[1] else None

        def of_weight() -> Tensor:
            return gradient_of_weight(gradient, x)

        def of_bias() -> Tensor:
            return gradient_of_bias(gradient)

        return (None, to_x, *_now_or_later(ctx, ctx.weight, of_weight, bias, of_bias))


def _now_or_later(
    ctx: Any,
    weight: Tensor,
    of_weight: Callable[[], Tensor],
    bias: Tensor | None,
    of_bias: Callable[[], Tensor],
) -> tuple[Tensor | None, Tensor | None]:
    """Compute the gradients of weight and bias, or defer them and return None.

    Only the gradient of a leaf tensor, or of a copy of one, can be deferred.

    `weight` is the parameter itself: where activations are recomputed, the tensor saved for the backward pass is a
    copy.
    """
    wanted = [
        (tensor, compute)
        for tensor, compute, needed in (
            (weight, of_weight, ctx.needs_input_grad[2]),
            (bias, of_bias, ctx.needs_input_grad[3]),
        )
        if tensor is not None and needed
    ]
    results = {}
    for tensor, compute in wanted:
        leaf = _leaf(tensor)
        if ctx.store.deferring and leaf is not None:
            ctx.store.defer(lambda t=leaf, c=compute: accumulate(t, c()))
        else:
            results[id(tensor)] = compute().to(tensor.dtype)
    return results.get(id(weight)), results.get(id(bias))


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, store: WeightGradients, x: Tensor, weight: Tensor, bias: Tensor | None, options: tuple[Any, ...]
    ) -> Tensor:
        output = torch.convolution(x, weight, bias, *options)
        ctx.save_for_backward(x, weight)
        ctx.store, ctx.weight, ctx.bias, ctx.options = store, weight, bias, options
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        x, weight = ctx.saved_tensors
        gradient, bias = gradients[0], ctx.bias
        wide, narrow = x.to(gradient.dtype), weight.to(gradient.dtype)
        sizes = None if bias is None else list(bias.shape)

        def part(*mask: bool) -> list[Tensor]:
            results: list[Tensor] = torch.ops.aten.convolution_backward(
                gradient, wide, narrow, sizes, *ctx.options, list(mask)
            )
            return results

        to_x = part(True, False, False)[0].to(x.dtype) if ctx.needs_input_grad[1] else None
        kept = _now_or_later(
            ctx, ctx.weight, lambda: part(False, True, False)[1], bias, lambda: part(False, False, True)[2]
        )
        return (None, to_x, *kept, None)
