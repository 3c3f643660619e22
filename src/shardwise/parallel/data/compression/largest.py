"""Top-k: the elements of largest size are sent, as values and places (Lin et al. 2018, Deep Gradient Compression)."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.options import Compression
from shardwise.parallel.data.compression.method import Peers, Steps
from shardwise.parallel.data.reducer import Flat, all_gather_flat
from shardwise.splitting.compression import largest


class Largest:
    """Method that sends the largest elements of a flat gradient, or of each worker's part of a scattered one."""

    def __init__(self, compression: Compression) -> None:
        self._compression = compression

    def whole(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum whole gradients, see `Method.whole`: what all send goes to all."""
        message = _taken(flat.view(1, -1), largest(self._compression, len(flat)))
        everybodys = message.new_empty(peers.ranks, message.numel())
        yield all_gather_flat(everybodys.view(-1), message.view(-1), group=peers.group, async_op=True), True
        return _added(everybodys, flat.dtype, len(flat))

    def scattered(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum scattered gradients, see `Method.scattered`: what is taken of a part goes to its worker."""
        parts = flat.view(peers.ranks, -1)
        message = _taken(parts, largest(self._compression, parts.shape[1]))
        received = torch.empty_like(message)
        yield dist.all_to_all_single(received.view(-1), message.view(-1), group=peers.group, async_op=True), True
        return _added(received, flat.dtype, parts.shape[1])

    def forget(self) -> None:
        """Do nothing: each step begins anew."""

    def tensors(self) -> list[Tensor]:
        """Return nothing: each step begins anew."""
        return []


def _taken(rows: Tensor, count: int) -> Tensor:
    """Take the `count` largest elements out of each row, leaving zeros. Returns the bytes of values and places."""
    places = rows.abs().topk(count, dim=1, sorted=False).indices
    values = rows.gather(1, places)
    rows.scatter_(1, places, 0)
    return torch.cat([values.view(torch.uint8), places.to(torch.int32).view(torch.uint8)], dim=1)


def _added(messages: Tensor, dtype: torch.dtype, elements: int) -> Tensor:
    """Add up what workers took, worker by worker: each names a place once, so that all workers get equal sums."""
    count = messages.shape[1] // (dtype.itemsize + 4)
    total = torch.zeros(elements, dtype=dtype, device=messages.device)
    for message in messages.unbind():
        values = message[: count * dtype.itemsize].clone().view(dtype)
        places = message[count * dtype.itemsize :].clone().view(torch.int32)
        total.index_add_(0, places, values)
    return total
