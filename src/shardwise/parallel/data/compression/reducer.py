"""Reducer that compresses with error feedback: what a step does not send is added to the next step's gradient.

    sent = C(gradient + error);  error = gradient + error - sent

so that over all workers, what was sent and the errors add up to the exact gradients (Seide et al. 2014; Karimireddy et
al. 2019). Every worker ends with bit-identical gradients: each element is summed in one place, or everywhere in one
order.

How the messages of two buckets follow each other is fixed, since all workers must issue them in one order: the later
messages of a bucket are issued when the next bucket is complete, or when it is waited for.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.options import Compression
from shardwise.parallel.data.compression.encoded import Encoded
from shardwise.parallel.data.compression.largest import Largest
from shardwise.parallel.data.compression.method import Method, Peers, Steps
from shardwise.parallel.data.compression.powersgd import PowerSGD
from shardwise.parallel.data.reducer import ExactReducer, Flat, Pending, reduce_scatter_flat

_METHODS: dict[str, Callable[[Compression], Method]] = {"powersgd": PowerSGD, "topk": Largest}


class Owed:
    """Errors of a worker's compressions, which its gradients still owe: one flat error for each flat gradient.

    DDP puts gradients into other buckets after its first step, so errors go by name from one flat gradient to another.
    """

    def __init__(self) -> None:
        self._flats: dict[Flat, Tensor] = {}
        self._apart: dict[str, Tensor] = {}

    def of(self, what: Flat, like: Tensor) -> Tensor:
        """Return the error for a flat gradient, to write to: zeros at first, in float32 or a wider dtype of `like`."""
        if what not in self._flats:
            wanted = set(what.names)
            for other in [flat for flat in self._flats if wanted & set(flat.names)]:
                parts = other.split(self._flats.pop(other))
                self._apart.update((name, part.clone()) for name, part in parts.items())
            found = {name: self._apart.pop(name) for name in what.names if name in self._apart}
            dtype = torch.promote_types(like.dtype, torch.float32)
            self._flats[what] = what.join(found, like.new_empty(0, dtype=dtype))
        return self._flats[what]

    def settle(self, what: Flat, flat: Tensor) -> None:
        """Add what earlier steps owe, under a strategy that compressed these gradients, to a flat gradient."""
        found = {name: self._apart.pop(name) for name in what.names if name in self._apart}
        if found:
            flat += what.join(found, flat)

    def pieces(self) -> dict[str, Tensor]:
        """Return the errors by the names of their parameters."""
        found = dict(self._apart)
        for what, flat in self._flats.items():
            found.update(what.split(flat))
        return found

    def tensors(self) -> list[Tensor]:
        """Return all tensors of errors."""
        return [*self._flats.values(), *self._apart.values()]

    def load(self, errors: Mapping[str, Tensor]) -> None:
        """Replace all errors by `errors`, which are kept."""
        self._flats.clear()
        self._apart = dict(errors)


Messages = Generator[tuple[Any, bool], None, None]
"""Messages of a reduction: (handle, whether it is the last one)."""


class CompressedReducer:
    """Reducer that compresses what it sends, with error feedback; see the module's docstring.

    Args:
        group: the workers whose gradients join: all replicas, or those of one axis if the others join theirs exactly.
        compression: how gradients are compressed.
        exactly: returns whether they are joined exactly now, which leaves errors as they are.

    Attributes:
        group: the workers whose gradients join.
        ranks: their number.
        owed: the errors.
        method: how gradients are compressed.
        exact: names of parameters whose gradients are never compressed. Those that every worker of `tp` computes whole
            belong to them: compressed in blocks with others, they would differ between these workers.
    """

    native = False
    dtype: torch.dtype | None = None

    def __init__(self, group: dist.ProcessGroup, compression: Compression, exactly: Callable[[], bool]) -> None:
        self.group, self.ranks = group, dist.get_world_size(group)
        self._peers = Peers(group, self.ranks, dist.get_rank(group))
        self._exactly, self._exact = exactly, ExactReducer(group, self.ranks)
        self._open: _MessageChain | None = None
        self.method = _METHODS.get(compression.kind, Encoded)(compression)
        self.owed = Owed()
        self.exact: frozenset[str] = frozenset()
        self._parts: dict[Flat, tuple[Flat, Flat]] = {}

    def all_reduce(self, flat: Tensor, what: Flat, *, mean: bool) -> Pending:
        """Start to join whole gradients, see `Reducer.all_reduce`."""
        if self._exactly():
            return self._exact.all_reduce(flat, what, mean=mean)
        if self._open is not None:
            self._open.issue()
        self._open = _MessageChain(self._joined(flat, flat, what, mean=mean))
        return self._open

    def reduce_scatter(self, output: Tensor, flat: Tensor, what: Flat) -> None:
        """Join scattered gradients, see `Reducer.reduce_scatter`."""
        if self._exactly():
            self._exact.reduce_scatter(output, flat, what)
            return
        _MessageChain(self._joined(output, flat, what, mean=True)).wait()

    def _joined(self, output: Tensor, flat: Tensor, what: Flat, *, mean: bool) -> Messages:
        """Join what is exact, then what is compressed, and write the result to `output`."""
        exact, rest = self._parted(what)
        if not exact.names:
            total = yield from self._compressed(flat, rest)
            output.copy_(total.div_(self.ranks) if mean else total)
            return
        given = what.take(flat, exact)
        self.owed.settle(exact, given)
        if what.ranks:
            summed = given.new_empty(sum(exact.sizes))
            yield reduce_scatter_flat(summed, given, group=self.group, async_op=True), not rest.names
        else:
            summed = given
            yield dist.all_reduce(summed, group=self.group, async_op=True), not rest.names
        what.put(output, exact, summed.div_(self.ranks) if mean else summed)
        if rest.names:
            total = yield from self._compressed(what.take(flat, rest), rest)
            what.put(output, rest, total.div_(self.ranks) if mean else total)

    def _compressed(self, flat: Tensor, what: Flat) -> Steps:
        """Sum gradients compressed, with error feedback."""
        error = self.owed.of(what, flat)
        error += flat
        method = self.method.scattered if what.ranks else self.method.whole
        total = yield from method(error, what, self._peers)
        error.nan_to_num_(0.0, 0.0, 0.0)  # the gradient of this step is not finite; those of later ones may be
        return total

    def _parted(self, what: Flat) -> tuple[Flat, Flat]:
        """Return what of a flat gradient is joined exactly, and what is compressed."""
        if what not in self._parts:
            exact = what.only(self.exact)
            self._parts[what] = exact, what.only(frozenset(what.names).difference(exact.names))
        return self._parts[what]

    def pieces(self) -> Mapping[str, Tensor]:
        """Return the errors by name, in the shapes of the gradients."""
        return self.owed.pieces()

    def tensors(self) -> list[Tensor]:
        """Return what is kept from step to step: errors, and what the method keeps."""
        return [*self.owed.tensors(), *self.method.tensors()]

    def load(self, errors: Mapping[str, Tensor]) -> None:
        """Begin with `errors`, in the shapes of `pieces`; what a method keeps of earlier steps is forgotten."""
        self.owed.load(errors)
        self.method.forget()


class _MessageChain:
    """Reduction of several messages, one after another.

    Args:
        steps: yields (handle of a message, whether it is the last one), and goes on once it is there.
    """

    def __init__(self, steps: Messages) -> None:
        self._steps: Messages | None = steps
        self._work, self._last = next(steps)

    def issue(self) -> None:
        """Issue all messages, waiting for all but the last."""
        while self._steps is not None and not self._last:
            self._work.wait()
            self._work, self._last = next(self._steps)

    def wait(self) -> None:
        """Complete the reduction."""
        self.issue()
        if self._steps is None:
            return
        self._work.wait()
        steps, self._steps = self._steps, None
        for _ in steps:
            raise AssertionError("a message after the last one")
        del self._work

    def future(self, flat: Tensor) -> torch.futures.Future[Tensor] | None:
        """Return None: only `wait` completes it."""
        return None
