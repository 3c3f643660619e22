"""Operations in the graph of one worker that draw random numbers or use the whole batch.

Where the module runs unchanged, its own dropout is replaced (`parallel.operators.dropout`). In a graph, each drawing
call knows its site, the shape of the whole tensor and the part that lies here. So the shards of a tensor drop the same
elements as one process would.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from shardwise.options import FLOAT32
from shardwise.parallel.engine import Position
from shardwise.parallel.operators.batch_norm import batch_norm
from shardwise.parallel.operators.dropout import attention_probabilities
from shardwise.parallel.operators.dropout import mask as draw_mask
from shardwise.parallel.operators.module_patches import ModulePatches
from shardwise.parallel.operators.piecewise_loss import (
    LossGradients,
    LossKind,
    OutputLayer,
    loss_and_gradients,
    with_gradients,
)
from shardwise.parallel.operators.random_numbers import draw
from shardwise.parallel.operators.selective_checkpoint import products_not_saved
from shardwise.parallel.tensor.communication import Exchange, Segments
from shardwise.parallel.tensor.placement import REPLICATED, Placement, Sharded
from shardwise.workload.precision import computing, kept_of
from shardwise.workload.trace.opaque import Call
from shardwise.workload.trace.python_state import PythonState

Shape = tuple[int, ...]

Values = Sequence[Mapping[Any, Any]]
"""Values in Python of a module, as `PythonState.read` returns them."""

Noted = Values | LossGradients
"""Note of the first run of a block for its recomputation."""


_ALONE = Exchange(None, 0, 1)


class GraphOperators:
    """Replacements for dropout, attention with dropout, batch norm, opaque modules and losses of a graph.

    Attributes:
        position: the position in the training; the engine keeps it up to date.
        exchange: the exchanges among the tensor-parallel workers.
        replicas: the workers over which batch norm computes its statistics. None: this one alone.
        recomputing: whether a block is being recomputed.
        gradient_factor: size of the gradients of a backward pass in proportion to the true ones.
        precision, float32: precision in which modules that were not traced compute, and what of the model stays in
            float32.
    """

    precision = FLOAT32
    float32: Sequence[str] = ()

    def __init__(
        self,
        position: Position,
        exchange: Exchange,
        replicas: dist.ProcessGroup | None,
        *,
        gradient_factor: float = 1,
    ) -> None:
        self.gradient_factor = gradient_factor
        self.position = position
        self.exchange = exchange
        self.replicas = replicas
        self.recomputing = False
        self._opaque: dict[nn.Module, tuple[ModulePatches, PythonState]] = {}
        self._noted: list[Noted] | None = None

    @contextmanager
    def at(self, position: Position, noted: list[Noted], *, again: bool) -> Iterator[None]:
        """Draw random numbers inside the block as at `position`, that of a microbatch whose block runs.

        Args:
            position: position of the microbatch.
            noted: list that the first run fills, in order, with the values of the opaque modules and the gradients of
                losses in pieces. Each recomputation reads it from the start: a derivative that a forward pass takes may
                have recomputed the block before.
            again: whether the block is recomputed.
        """
        before = self.position, self.recomputing, self._noted
        self.position, self.recomputing, self._noted = position, again, list(noted) if again else noted
        try:
            yield
        finally:
            self.position, self.recomputing, self._noted = before

    def mask(self, site: int, shape: Shape, p: float, placement: Placement, like: Tensor, merged: bool) -> Tensor:
        """Draw the dropout factors of the part at `placement` of a tensor of `shape`."""
        whole = torch.Size(shape)
        if not isinstance(placement, Sharded):
            return draw_mask(self.position, site, whole, p, like, merged=merged)
        spans = placement.spans

        def cut(tensor: Tensor, dim: int) -> Tensor:
            return self.exchange.cut(tensor, dim, spans)

        return draw_mask(self.position, site, whole, p, like, merged=merged, along=placement.dim, cut=cut)

    def dropout(
        self, x: Tensor, p: float, site: int, shape: Shape, placement: Placement, features: int, merged: bool
    ) -> Tensor:
        """Apply dropout to the part at `placement` of a tensor of `shape`.

        Args:
            x: this worker's part.
            p: probability of dropping.
            site: index of the drawing call in the step.
            shape: shape of the whole tensor.
            placement: placement of the part.
            features: 0 draws for every element; n draws for the first n dimensions only, so that whole channels are
                dropped.
            merged: whether the first dimension is samples times heads.
        """
        lead = features or len(shape)
        if isinstance(placement, Sharded) and placement.dim >= lead:
            mask = self.mask(site, shape[:lead], p, REPLICATED, x, merged)
        else:
            mask = self.mask(site, shape[:lead], p, placement, x, merged)
        return x * mask.view(*x.shape[:lead], *(1,) * (x.dim() - lead))

    def draw(self, name: str, site: int, *args: Any, **kwargs: Any) -> Tensor:
        """Call torch's function `name` with random numbers that do not depend on the worker, see `random_numbers`."""
        return draw(self.position, site, name, args, kwargs)

    def attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None,
        p: float,
        is_causal: bool,
        scale: float | None,
        site: int,
        shape: Shape,
        placement: Placement,
    ) -> Tensor:
        """Compute attention with dropout on its probabilities, see `DropoutReplacements.attention`.

        `shape` and `placement` are those of the probabilities: the shape of the whole, and where this worker's part
        lies.
        """
        probabilities = attention_probabilities(query, key, attn_mask, is_causal, scale, False)
        mask = self.mask(site, shape, p, placement, probabilities, False)
        return (probabilities * mask).to(value.dtype) @ value

    def batch_norm(
        self,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
    ) -> Tensor:
        """Compute batch norm in training, over the counted samples of all replicas."""
        counted = self.position.counted > 0
        if self.replicas is None and counted:
            return torch.batch_norm(x, weight, bias, running_mean, running_var, True, momentum, eps, False)
        return batch_norm(x, weight, bias, running_mean, running_var, momentum, eps, self.replicas, counted=counted)

    def loss_in_pieces(
        self,
        pieces: int,
        tensors: tuple[Tensor, Tensor, Tensor | None],
        target: Tensor,
        spans: Segments,
        options: tuple[int, int, float],
        dtype: torch.dtype,
    ) -> Tensor:
        """Compute an output layer and its cross entropy in pieces, once: the recomputation of a block gets the results.

        `tensors` are those of an `OutputLayer` and `options` those of a `LossKind`, as plain tuples of a graph. `spans`
        are those of the classes that the tensor-parallel workers share, empty if each has all. `dtype` is that of the
        loss. The other arguments are those of `piecewise_loss.loss_and_gradients`.
        """
        layer = OutputLayer(*tensors)
        found = self._noted.pop(0) if self._noted is not None and self.recomputing else None
        if not isinstance(found, LossGradients):
            wanted = [torch.is_grad_enabled() and each is not None and each.requires_grad for each in layer]
            exchange, spans = (self.exchange, spans) if spans else (_ALONE, (layer.weight.shape[0],))
            with products_not_saved():
                found = loss_and_gradients(exchange, spans, pieces, layer, target, LossKind(*options), wanted)
            if self._noted is not None:
                self._noted.append(found)
        return with_gradients(found, layer, dtype)

    def opaque(self, call: Call, site: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        """Call a module that was not traced. `site` is the number of calls that have drawn dropout before it."""
        operations, state = self._prepared(call.module, tensors[0].device)
        buffers = [tensor for tensor in tensors[: len(call.state)] if not isinstance(tensor, nn.Parameter)]
        # a dummy sample that only keeps the worker in step must leave no trace
        before = [] if self.position.counted else [(buffer, buffer.clone()) for buffer in buffers]
        kept = kept_of(self.precision, call.module, self.float32, call.path)
        given = [tensor for name, tensor in zip(call.state, tensors, strict=False) if name in kept.names]
        kept = replace(kept, tensors=lambda: given)
        precise = computing(self.precision, tensors[: len(call.state)], kept=kept)
        with self._as_in_first_run(state), precise, operations.drawing_from(site, self.position):
            results = call.run(tensors)
        for buffer, value in before:
            buffer.copy_(value)
        return results

    def _prepared(self, module: nn.Module, device: torch.device) -> tuple[ModulePatches, PythonState]:
        """Return the replaced operations of an opaque module and its values in Python; both are made once."""
        if module not in self._opaque:
            group = self.replicas
            make_group = None if group is None else lambda: group
            operations = ModulePatches(self.position, device, make_group, gradient_factor=self.gradient_factor)
            operations.install(module)
            self._opaque[module] = operations, PythonState(module)
        return self._opaque[module]

    def _as_in_first_run(self, state: PythonState) -> AbstractContextManager[None]:
        """Return a context in which values in Python are as in the first run of the block, if it is recomputed."""
        if self._noted is None:
            return nullcontext()
        if self.recomputing:
            values: Any = self._noted.pop(0)
            return state.as_at(values)
        self._noted.append(state.read())
        return nullcontext()

    @property
    def draws_other_random_numbers(self) -> bool:
        """Return whether an untraced module has drawn random numbers that workers do not share."""
        return any(operations.draws_other_random_numbers for operations, _ in self._opaque.values())
