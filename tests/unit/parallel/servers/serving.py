"""A small workload, its server's state, and workers' contributions to it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from shardwise.parallel.servers.frames import Frame, Kind
from shardwise.parallel.servers.rows import contribution
from shardwise.parallel.servers.shard import Shard
from shardwise.workload.workload import Workload

SHAPES = {"table": (8, 3), "weight": (4, 3), "bias": (4,)}


def adam(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.AdamW(parameters, lr=0.1)


def work(optimizer: Callable[[Any], Any] = adam) -> Workload:
    return Workload(
        name="served",
        model=nn.Identity,
        dataset=(),
        inputs=lambda batch: batch,
        loss=lambda output, batch: output,
        optimizer=optimizer,
        batch_size=4,
    )


def trained() -> dict[str, nn.Parameter]:
    return {name: nn.Parameter(torch.empty(shape, device="meta")) for name, shape in SHAPES.items()}


def first() -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(0)
    return {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}


def gradients(rank: int, step: int) -> dict[str, Tensor]:
    """Gradients of one worker in one step; it uses two rows of the table."""
    draw = torch.Generator().manual_seed(100 * step + rank)
    found = {name: torch.randn(shape, generator=draw) for name, shape in SHAPES.items()}
    used = torch.randperm(8, generator=draw)[:2]
    table = torch.zeros(8, 3)
    table[used] = found["table"][used]
    return found | {"table": table}


def shard(workers: int, names: Sequence[str] = tuple(SHAPES), optimizer: Callable[[Any], Any] = adam) -> Shard:
    made = Shard(work(optimizer), trained(), names, workers)
    made.take(write())
    return made


def write() -> Frame:
    return Frame(Kind.WRITE, {}, {f"p/{name}": value for name, value in first().items()})


def push(rank: int, clock: int, *, together: bool, given: dict[str, Tensor] | None = None, **facts: Any) -> Frame:
    tensors, sparse = contribution(gradients(rank, clock) if given is None else given)
    usual = {"rank": rank, "clock": clock, "weight": 1.0, "losses": [float(rank)], "sparse": sparse}
    return Frame(Kind.PUSH, {**usual, "together": together, **facts}, tensors)


def apply(clock: int, *, applied: bool = True, factor: float | None = None) -> Frame:
    return Frame(Kind.APPLY, {"clock": clock, "applied": applied, "factor": factor})
