"""Execution of collectives that all ranks agree about, on torch.distributed.

Movements (all-gather, broadcast, all-to-all) travel as bytes, so every dtype works. Reductions compute in the tensor's
dtype; dtypes that gloo does not reduce (`bool`, `int16`) travel as int32. Factors are applied in float64 for whole
numbers and in float32 for halves, as in Horovod.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.compat.horovod.requests import (
    ADASUM,
    AVERAGE,
    MAX,
    MIN,
    PRODUCT,
    SUM,
    CollectiveRequest,
    HorovodInternalError,
)

_OPS = {
    SUM: dist.ReduceOp.SUM,
    AVERAGE: dist.ReduceOp.SUM,
    MIN: dist.ReduceOp.MIN,
    MAX: dist.ReduceOp.MAX,
    PRODUCT: dist.ReduceOp.PRODUCT,
}

HEAD_BYTES, LENGTH_BYTES = 2048, 8
"""Size of the first message of each exchange, which is mostly the only one, and of the length that it begins with."""

_HALVES = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Members:
    """Ranks that take part in a collective.

    Attributes:
        group: their process group; only one thread uses it.
        ranks: their global ranks, ascending.
        place: place of this process among them.
    """

    group: Any
    ranks: tuple[int, ...]
    place: int

    @property
    def size(self) -> int:
        """Return the number of ranks."""
        return len(self.ranks)


def exchange(members: Members, message: bytes) -> list[bytes]:
    """Send a message to all members and return those of all, in the order of their ranks."""
    data = len(message).to_bytes(LENGTH_BYTES, "little") + message
    heads = _gathered_bytes(data[:HEAD_BYTES], HEAD_BYTES, members)
    sizes = [LENGTH_BYTES + int.from_bytes(head[:LENGTH_BYTES], "little") for head in heads]
    if max(sizes) > HEAD_BYTES:
        rests = _gathered_bytes(data[HEAD_BYTES:], max(sizes) - HEAD_BYTES, members)
        heads = [head + rest for head, rest in zip(heads, rests, strict=True)]
    return [head[LENGTH_BYTES:size] for head, size in zip(heads, sizes, strict=True)]


def _gathered_bytes(data: bytes, size: int, members: Members) -> list[bytes]:
    """Return `size` bytes of each member, filled up with zeros."""
    own = torch.frombuffer(bytearray(data.ljust(size, b"\0")), dtype=torch.uint8)
    return [bytes(buffer.numpy()) for buffer in _gathered(own, members)]


def allreduce(requests: Sequence[CollectiveRequest], groups: Sequence[Sequence[Tensor]], members: Members) -> list[Any]:
    """Reduce all tensors of several requests that share their reduction in one message; return the results likewise."""
    first = requests[0]
    tensors = [tensor for group in groups for tensor in group]
    reduced: dict[int, Tensor] = {}
    for dtype in dict.fromkeys(tensor.dtype for tensor in tensors):
        numbers = [number for number, tensor in enumerate(tensors) if tensor.dtype == dtype]
        alike = [tensors[number] for number in numbers]
        if first.op == ADASUM:
            results = [_adasum(tensor, members) for tensor in alike]
        else:
            results = _reduced_together(alike, first, members)
        reduced.update(zip(numbers, results, strict=True))
    ordered = iter(reduced[number] for number in range(len(tensors)))
    return [[next(ordered) for _ in group] for group in groups]


def _reduced_together(tensors: Sequence[Tensor], request: CollectiveRequest, members: Members) -> list[Tensor]:
    """Reduce tensors of one dtype in one message."""
    flat = torch.cat([tensor.detach().reshape(-1) for tensor in tensors])
    parts = _reduced(flat, request, members).split([tensor.numel() for tensor in tensors])  # type: ignore[no-untyped-call]
    alone = len(parts) == 1  # parts of a larger buffer would keep all of it alive
    return [(part if alone else part.clone()).view(t.shape) for part, t in zip(parts, tensors, strict=True)]


def _reduced(flat: Tensor, request: CollectiveRequest, members: Members) -> Tensor:
    """Return the reduction of a flat tensor over all members, with the factors of a request."""
    dtype = flat.dtype
    flat = scaled(flat, request.prescale)
    if dtype in (torch.bool, torch.int16):
        flat = flat.to(torch.int32)
    dist.all_reduce(flat, _OPS[request.op], group=members.group)
    flat = scaled(flat, request.postscale, members.size if request.op == AVERAGE else 1)
    return flat.to(dtype)


def scaled(tensor: Tensor, factor: float, divisor: int = 1) -> Tensor:
    """Return `tensor * factor / divisor` in the tensor's dtype; whole numbers are truncated, as in Horovod."""
    if factor == 1.0 and divisor == 1:
        return tensor
    exact = tensor.dtype
    if not exact.is_floating_point and not exact.is_complex:
        exact = torch.float64
    elif exact in _HALVES:
        exact = torch.float32
    value = tensor.to(exact)
    value = value if factor == 1.0 else value * factor
    return (value if divisor == 1 else value / divisor).to(tensor.dtype)


def _adasum(tensor: Tensor, members: Members) -> Tensor:
    """Return Adasum of a tensor over all members: the sum of orthogonal tensors, the mean of parallel ones.

    Source: Maleki et al., "Scaling Distributed Training with Adaptive Summation", https://arxiv.org/abs/2006.02924
    """
    if members.size & (members.size - 1):
        raise HorovodInternalError(f"Adasum needs a power of two of ranks, there are {members.size}: use Average")
    values = _gathered(tensor.detach(), members)
    while len(values) > 1:
        values = [_pair_sum(one, other) for one, other in zip(values[::2], values[1::2], strict=True)]
    return values[0].to(tensor.dtype)


def _pair_sum(one: Tensor, other: Tensor) -> Tensor:
    """Return Adasum of two tensors: each without half of what it shares with the other."""
    a, b = one.to(torch.float64), other.to(torch.float64)
    dot, norm_a, norm_b = (a * b).sum(), (a * a).sum(), (b * b).sum()
    share_a = 1.0 if norm_a == 0 else 1 - float(dot / (2 * norm_a))
    share_b = 1.0 if norm_b == 0 else 1 - float(dot / (2 * norm_b))
    return share_a * a + share_b * b


def _gathered(tensor: Tensor, members: Members) -> list[Tensor]:
    """Return the tensors of all members, which have one shape."""
    tensor = tensor.contiguous()
    values = [torch.empty_like(tensor) for _ in members.ranks]
    dist.all_gather(values, tensor, group=members.group)
    return values


def reducescatter(request: CollectiveRequest, tensors: Sequence[Tensor], members: Members) -> list[Tensor]:
    """Reduce tensors and return this rank's rows of each; the first ranks get one more if they cannot be equal."""
    results = []
    for tensor in tensors:
        whole = _reduced(tensor.detach().reshape(-1).clone(), request, members).view(tensor.shape)
        start, rows = share_of(tensor.shape[0], members.size, members.place)
        results.append(whole[start : start + rows].clone())
    return results


def share_of(rows: int, size: int, place: int) -> tuple[int, int]:
    """Return where the rows of member `place` start, and their number: `rows` divided, the first get one more."""
    least, more = divmod(rows, size)
    return place * least + min(place, more), least + (place < more)


def allgather(requests: Mapping[int, CollectiveRequest], tensors: Sequence[Tensor], members: Members) -> list[Tensor]:
    """Concatenate the tensors of all ranks along the first dimension, which may differ."""
    results = []
    for index, tensor in enumerate(tensors):
        rows = [requests[rank].shapes[index][0] for rank in members.ranks]
        width = _row_bytes(tensor)
        own = torch.zeros(max(rows) * width, dtype=torch.uint8, device=tensor.device)
        own[: tensor.shape[0] * width] = _bytes(tensor)
        pieces = [piece[: count * width] for piece, count in zip(_gathered(own, members), rows, strict=True)]
        results.append(_tensor(torch.cat(pieces), tensor.dtype, (sum(rows), *tensor.shape[1:])))
    return results


def broadcast(request: CollectiveRequest, tensors: Sequence[Tensor], members: Members) -> list[Tensor]:
    """Return the tensors of the root rank."""
    results = []
    for tensor in tensors:
        sent = _bytes(tensor).clone()
        dist.broadcast(sent, request.root, group=members.group)
        results.append(_tensor(sent, tensor.dtype, tuple(tensor.shape)))
    return results


def alltoall(requests: Mapping[int, CollectiveRequest], tensors: Sequence[Tensor], members: Members) -> list[Tensor]:
    """Return the rows that all ranks send to this one, in the order of the ranks, and their numbers as int32."""
    (tensor,) = tensors
    sent = requests[members.ranks[members.place]].splits
    received = [requests[rank].splits[members.place] for rank in members.ranks]
    width = _row_bytes(tensor)
    out = torch.empty(sum(received) * width, dtype=torch.uint8, device=tensor.device)
    own = _bytes(tensor)[: sum(sent) * width].contiguous()
    dist.all_to_all_single(out, own, [n * width for n in received], [n * width for n in sent], group=members.group)
    shape = (sum(received), *tensor.shape[1:])
    return [_tensor(out, tensor.dtype, shape), torch.tensor(received, dtype=torch.int32)]


def _row_bytes(tensor: Tensor) -> int:
    return math.prod(tensor.shape[1:]) * tensor.element_size()


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def _tensor(data: Tensor, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    return data.view(dtype).view(shape)
