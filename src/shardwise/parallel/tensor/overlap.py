"""Run the collectives of backward passes beside the gradients of weights, which do not need them.

A value that enters sharded linear layers has a gradient that is summed over the workers (`Exchange.enter`,
`gather_enter`). Nothing before them in the backward pass needs the gradients of the layers' weights, so these are put
off until the collective runs (Megatron-LM; Korthikanti et al. 2022, section 4.2.2, do so as well):

    before    x -> enter -> linear(., w)
    after     x -> awaited -> enter_unawaited -> linear(., late(w))     with late(w) called before enter_unawaited

Autograd runs the backward pass in the reverse order of the forward pass, one node after another. So it computes the
gradients of the layers' inputs, starts the collective, computes the gradients of the weights (`late`), and waits
(`awaited`). The gradient of a weight reaches its parameter through autograd: whatever waits for it there is told.

The layers of one collective are those between it and the next one: those that take its value, and those after them that
end in a partial sum, whose weights have gradients too that nothing waits for.

With `again`, a value that is gathered is not saved for the gradients of the weights. The layers save this worker's part
of it, and the backward pass gathers it again, once for all layers that took it, beside the gradients of their inputs
(section 4.2.2):

    gradient of the last layer's output arrives: start to gather the value
    compute the gradients of the layers' inputs, start their reduce-scatter
    wait for the value, compute the gradients of the weights, wait for the reduce-scatter
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from shardwise.parallel.pipeline.weight_gradients import gradient_of_bias, gradient_of_weight
from shardwise.parallel.tensor.aliasing import roots, writes_in_place
from shardwise.parallel.tensor.communication import Exchange, Regathered

aten = torch.ops.aten

_SILENT = (Exchange.divide,)
"""Exchanges that send nothing."""


@dataclass(slots=True)
class _Entry:
    """A value that enters sharded work, with the linear layers whose weights have gradients beside its collective."""

    node: fx.Node
    layers: list[fx.Node] = field(default_factory=list)


def overlap(graph: fx.Graph, tensors: Collection[str], *, direct: bool = False, again: bool = False) -> None:
    """Start the collectives of a backward pass before the gradients of weights that do not need them.

    Changes the graph in place.

    Args:
        graph: a worker's graph of a training step.
        tensors: placeholders of parameters and buffers.
        direct: whether only layers that take the value of the collective itself are changed: the others are compiled
            with what is before them, and save less so.
        again: whether layers save this worker's part of an input that is gathered, see `Strategy.gathers_again`.
    """
    where = roots(graph)
    written = {where[node] for node in graph.nodes if writes_in_place(node)}
    for entry in list(_entries(graph, tensors, direct=direct)):
        if entry.layers and entry.node not in written:
            _overlap(graph, entry, tensors, again=again)


def overlapping(graph: fx.Graph) -> list[tuple[fx.Node, fx.Node]]:
    """Return (first, last) pairs of calls that run beside one collective in the backward pass."""
    found: dict[fx.Node, fx.Node] = {}
    first = None
    for node in graph.nodes:
        if _exchange_of(node) is Exchange.awaited:
            first = node
        elif node.target is linear and first is not None:
            found[first] = node
    return list(found.items())


def _exchange_of(node: fx.Node) -> Callable[..., Any] | None:
    """Return the method of `Exchange` that a call calls. Returns None if it calls none."""
    bound = isinstance(getattr(node.target, "__self__", None), Exchange)
    return node.target.__func__ if bound else None  # type: ignore[union-attr]


def _entries(graph: fx.Graph, tensors: Collection[str], *, direct: bool) -> Iterator[_Entry]:
    entry: _Entry | None = None
    for node in graph.nodes:
        exchange = _exchange_of(node)
        if exchange in (Exchange.enter, Exchange.gather_enter):
            if node.args[0].op != "placeholder":  # the gradient of a parameter, which no layer takes
                entry = _Entry(node)
                yield entry
        elif exchange is not None and exchange not in _SILENT:
            entry = None
        elif entry is not None and _is_layer(node, tensors) and (not direct or node.args[0] is entry.node):
            entry.layers.append(node)


def _is_layer(node: fx.Node, tensors: Collection[str]) -> bool:
    return node.target is aten.linear.default and _is_tensor(node.args[1], tensors)


def _is_tensor(argument: Any, tensors: Collection[str]) -> bool:
    return isinstance(argument, fx.Node) and argument.name in tensors and bool(argument.meta.get("grad"))


def _overlap(graph: fx.Graph, entry: _Entry, tensors: Collection[str], *, again: bool) -> None:
    """Rewrite one collective and its layers, see the module's docstring."""
    node = entry.node
    exchange: Exchange = node.target.__self__  # type: ignore[union-attr]
    x, *where = node.args
    with graph.inserting_before(node):
        held = _called(graph, exchange.awaited, (x,), node)
        for layer in entry.layers:
            x, *weights = layer.args
            seen = [_called(graph, late, (w,), w) if _is_tensor(w, tensors) else w for w in weights]
            layer.target, layer.args = linear, (x, *seen)
    for layer in reversed(entry.layers):
        if layer.args[0] is node:  # next to each other, so that what is between them is compiled as one region
            node.append(layer)
    if _exchange_of(node) is Exchange.enter:
        fresh = all(user.target in (linear, aten.linear.default) for user in node.users)
        node.target, node.args = exchange.enter_unawaited, (held, fresh)
    else:
        again = again and not any(_saves_input(user) for user in node.users)
        node.target, node.args = exchange.gather_enter_unawaited, (held, *where, again)


def _saves_input(user: fx.Node) -> bool:
    """Return whether a call that takes a gathered value saves it for the backward pass, unless it is our `linear`."""
    frozen = user.target is aten.linear.default and not user.args[1].meta.get("grad")  # type: ignore[union-attr]
    return user.target is not linear and not frozen


def _called(graph: fx.Graph, target: Any, args: tuple[Any, ...], like: Any) -> fx.Node:
    made = graph.call_function(target, args)
    made.meta.update(like.meta)
    return made


# ---- what the graph then calls --------------------------------------------------------------------------------------


@dataclass(slots=True)
class _PutOff:
    """Gradient that is computed later: `compute` does it. None until the backward pass has come to its layer."""

    compute: Callable[[], Tensor] | None = None


def late(weight: Tensor) -> Tensor:
    """Return a weight or bias unchanged, whose gradient `linear` leaves to be computed at this place."""
    put_off = _PutOff()
    seen: Any = _Late.apply(weight, put_off)  # type: ignore[no-untyped-call]
    seen.put_off = put_off
    return seen  # type: ignore[no-any-return]


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Compute `torch.nn.functional.linear` with a weight, and perhaps a bias, that come from `late`."""
    if not torch.is_grad_enabled():
        return F.linear(x, weight, bias)
    is_late = bias is not None and hasattr(bias, "put_off")
    regathered: Regathered | None = getattr(x, "regathered", None)
    saved: Any = x if regathered is None else x.part  # type: ignore[attr-defined]
    x = _Kept.apply(x, saved, regathered, weight, bias if is_late else None)  # type: ignore[no-untyped-call]
    output = F.linear(x, weight.detach(), bias.detach() if bias is not None and is_late else bias)
    output.register_hook(partial(_arrived, x.grad_fn))  # type: ignore[no-untyped-call]
    return output


def _arrived(kept: Any, gradient: Tensor) -> None:
    """Note the gradient of a linear layer's output at the node that is before it, and start to gather its input."""
    (saved,) = kept.saved_tensors
    if kept.regathered is not None:
        kept.regathered.start(saved)
    kept.gradient, kept.input = gradient, saved


class _Late(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, put_off: _PutOff) -> Tensor:
        ctx.put_off = put_off
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *_: Tensor) -> tuple[Tensor, None]:
        compute, ctx.put_off.compute = ctx.put_off.compute, None
        return compute(), None


class _Kept(torch.autograd.Function):
    """The input of a linear layer, kept for the gradients of its weight and bias: whole, or this worker's part of it.

    It is a node before the layer: autograd has its input saved before the layer computes, so that a recomputation which
    needs no more than this ends there.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, saved: Tensor, regathered: Regathered | None, weight: Tensor, bias: Tensor | None
    ) -> Tensor:
        ctx.save_for_backward(saved)
        ctx.regathered, ctx.weight, ctx.bias = regathered, weight, bias
        if regathered is not None:
            regathered.layers += 1
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        gradient, x, regathered = ctx.gradient, ctx.input, ctx.regathered
        ctx.gradient = ctx.input = None
        whole = partial(_same, x) if regathered is None else regathered.take
        ctx.weight.put_off.compute = lambda: gradient_of_weight(gradient, whole())
        if ctx.bias is not None:
            ctx.bias.put_off.compute = partial(gradient_of_bias, gradient)
        # in place of the gradients, which nothing reads before `_Late` computes them: autograd goes on to it
        return gradients[0], None, None, ctx.weight.detach(), None if ctx.bias is None else ctx.bias.detach()


def _same(x: Tensor) -> Tensor:
    return x
