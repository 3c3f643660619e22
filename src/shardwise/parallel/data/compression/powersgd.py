"""PowerSGD: matrices are summed as products of two narrow factors (Vogels et al. 2019, algorithm 1).

    P = sum of M Q over the workers, orthogonalised;  Q = sum of M' P;  the sum of M is about P Q'

Q is kept for the next step (warm start), so that the power iteration goes on from step to step. Vectors, and matrices
that factors would not make smaller, are summed exactly.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from typing import Any
from zlib import crc32

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.options import Compression
from shardwise.parallel.data.compression.method import Peers, Steps
from shardwise.parallel.data.reducer import Flat, reduce_scatter_flat
from shardwise.splitting.compression import is_factored, matrix

Named = dict[str, Tensor]


class PowerSGD:
    """Method that sums matrices as products of two factors.

    Attributes:
        starts: Q of each matrix by name, with which the next step begins: equal on all workers.
    """

    def __init__(self, compression: Compression) -> None:
        self._rank = int(compression.number)
        self.starts: Named = {}

    def whole(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum whole gradients, see `Method.whole`."""
        matrices, exact = self._parted(what.split(flat))
        found = yield from self._products(matrices, exact, peers, more=False)
        for name, each in matrices.items():
            each.sub_(found[name], alpha=1 / peers.ranks)
        for each in exact.values():
            each.zero_()
        return torch.cat([found[name].reshape(-1) for name in what.names])

    def scattered(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum scattered gradients, see `Method.scattered`."""
        matrices, exact = self._parted(what.split(flat))
        total = flat.new_zeros(sum(what.sizes))
        parts = dict(zip(what.names, torch.split(total, list(what.sizes)), strict=True))
        products = yield from self._products(matrices, {}, peers, more=bool(exact))
        for name, product in products.items():
            rows = -(-len(product) // peers.ranks)
            mine = product[peers.rank * rows : (peers.rank + 1) * rows].reshape(-1)
            parts[name][: len(mine)] = mine
            matrices[name].sub_(product, alpha=1 / peers.ranks)
        if exact:
            shapes = dict(zip(what.names, what.shapes, strict=True))
            rest = Flat(tuple(exact), tuple(shapes[name] for name in exact), peers.ranks)
            given = rest.join(exact, flat)
            own = given.new_empty(sum(rest.sizes))
            yield reduce_scatter_flat(own, given, group=peers.group, async_op=True), True
            for name, part in zip(exact, torch.split(own, list(rest.sizes)), strict=True):
                parts[name].copy_(part)
        flat.copy_(what.join(matrices, flat))
        return total

    def forget(self) -> None:
        """Forget the factors Q: the next step begins with random ones."""
        self.starts.clear()

    def tensors(self) -> list[Tensor]:
        """Return the factors Q."""
        return list(self.starts.values())

    def _parted(self, gradients: Mapping[str, Tensor]) -> tuple[Named, Named]:
        """Return the gradients to factor, as matrices that share their memory, and those to sum exactly."""
        factored = {name: each.view(matrix(each.shape)) for name, each in gradients.items() if self._factors(each)}
        return factored, {name: each for name, each in gradients.items() if name not in factored}

    def _factors(self, gradient: Tensor) -> bool:
        return is_factored(gradient.shape, self._rank)

    def _products(
        self, matrices: Named, exact: Named, peers: Peers, *, more: bool
    ) -> Generator[tuple[Any, bool], None, Named]:
        """Sum matrices, and on the way gradients exactly. Returns the sums; `more` says that other messages follow."""
        found: Named = {}
        lefts = [each @ self._start(name, each) for name, each in matrices.items()]
        if lefts or exact:
            first = torch.cat([each.reshape(-1) for each in (*exact.values(), *lefts)])
            yield dist.all_reduce(first, group=peers.group, async_op=True), not (lefts or more)
            sums = _cut(first, [*exact.values(), *lefts])
            found = dict(zip(exact, sums, strict=False))
            lefts = [torch.linalg.qr(each).Q for each in sums[len(exact) :]]
        if not lefts:
            return found
        rights = [each.T @ left for each, left in zip(matrices.values(), lefts, strict=True)]
        second = torch.cat([each.reshape(-1) for each in rights])
        yield dist.all_reduce(second, group=peers.group, async_op=True), not more
        rights = _cut(second, rights)
        self.starts.update((name, right / peers.ranks) for name, right in zip(matrices, rights, strict=True))
        products = zip(matrices, lefts, rights, strict=True)
        return found | {name: left @ right.T for name, left, right in products}

    def _start(self, name: str, gradient: Tensor) -> Tensor:
        """Return Q of a matrix: that of the step before, or random numbers that all workers draw alike."""
        if name not in self.starts:
            generator = torch.Generator().manual_seed(crc32(name.encode()))
            drawn = torch.randn(gradient.shape[1], self._rank, generator=generator, dtype=torch.float32)
            self.starts[name] = drawn.to(gradient)
        return self.starts[name]


def _cut(flat: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Cut a flat tensor into tensors of the shapes of `like`."""
    parts = torch.split(flat, [each.numel() for each in like])
    return [part.view(each.shape) for part, each in zip(parts, like, strict=True)]
