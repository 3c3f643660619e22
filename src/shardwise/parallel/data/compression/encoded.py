"""Every element is sent in few bits: each worker sums its part of all gradients, and sends the sum encoded again.

The error of the second encoding is added to the own error of the worker that made it: it is owed like any other.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.options import Compression
from shardwise.parallel.data.compression.codecs import CODECS
from shardwise.parallel.data.compression.method import Peers, Steps
from shardwise.parallel.data.reducer import Flat, all_gather_flat
from shardwise.splitting.compression import part_elements


class Encoded:
    """Method that encodes all elements, with one of CODECS."""

    def __init__(self, compression: Compression) -> None:
        self._compression, self._codec = compression, CODECS[compression.kind]

    def whole(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum whole gradients, see `Method.whole`."""
        size = part_elements(self._compression, len(flat), peers.ranks)
        parts = flat.new_zeros(peers.ranks * size)
        parts[: len(flat)] = flat
        parts = parts.view(peers.ranks, size)
        code = self._codec.encode(parts)
        received = torch.empty_like(code)
        work = dist.all_to_all_single(received.view(-1), code.view(-1), group=peers.group, async_op=True)
        parts -= self._codec.decode(code, flat.dtype)
        yield work, False
        own = self._codec.decode(received, flat.dtype).sum(0, keepdim=True)
        sent = self._codec.encode(own)
        everybodys = torch.empty_like(received)
        work = all_gather_flat(everybodys.view(-1), sent.view(-1), group=peers.group, async_op=True)
        parts[peers.rank] += (own - self._codec.decode(sent, flat.dtype)).view(-1)
        flat.copy_(parts.view(-1)[: len(flat)])
        del parts, code, received, own  # other gradients may come before the last message is waited for
        yield work, True
        return self._codec.decode(everybodys, flat.dtype).view(-1)[: len(flat)]

    def scattered(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum scattered gradients, see `Method.scattered`."""
        given = flat.view(peers.ranks, -1)
        length = given.shape[1]
        parts = flat.new_zeros(peers.ranks, part_elements(self._compression, len(flat), peers.ranks))
        parts[:, :length] = given
        code = self._codec.encode(parts)
        received = torch.empty_like(code)
        work = dist.all_to_all_single(received.view(-1), code.view(-1), group=peers.group, async_op=True)
        given -= self._codec.decode(code, flat.dtype)[:, :length]
        yield work, True
        return self._codec.decode(received, flat.dtype).sum(0)[:length]

    def forget(self) -> None:
        """Do nothing: each step begins anew."""

    def tensors(self) -> list[Tensor]:
        """Return nothing: each step begins anew."""
        return []
