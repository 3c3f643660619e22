"""Collect values of all workers: small ones as JSON (nothing received is unpickled), tensors piece by piece."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.state.layout import Layout, TensorPiece, Tile
from shardwise.workload.pytree import facts


def gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    """Gather the JSON-able `value` of every worker of `group`, by rank. Collective."""
    with facts():
        return _gather_json(value, group, device)


def _gather_json(value: Any, group: dist.ProcessGroup, device: torch.device) -> list[Any]:
    content = torch.tensor(list(json.dumps(value).encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([content.numel()], device=device)
    sizes = [torch.empty_like(size) for _ in range(group.size())]
    dist.all_gather(sizes, size, group=group)
    longest = max(int(size) for size in sizes)
    padded = torch.zeros(longest, dtype=torch.uint8, device=device)
    padded[: content.numel()] = content
    contents = [torch.empty_like(padded) for _ in sizes]
    dist.all_gather(contents, padded, group=group)
    return [json.loads(bytes(content[: int(size)].tolist())) for content, size in zip(contents, sizes, strict=True)]


def anywhere(flags: Sequence[bool], group: dist.ProcessGroup, device: torch.device) -> list[bool]:
    """Return for each of `flags` whether it is true on any worker of `group`. Collective."""
    with facts():
        found = torch.tensor([int(flag) for flag in flags], device=device)
        dist.all_reduce(found, dist.ReduceOp.MAX, group=group)
        return [bool(flag) for flag in found.tolist()]


def gather_full(
    pieces: Sequence[TensorPiece], group: dist.ProcessGroup | None, device: torch.device
) -> dict[str, Tensor] | None:
    """Gather full tensors by name on the CPU of worker 0. Returns None elsewhere. Collective.

    Every worker passes the pieces that it holds. Those that it `writes` are sent from `device`.
    """
    mine = [piece for piece in pieces if piece.writes and piece.layout.tiles]
    full: dict[str, Tensor] = {}
    if group is None or group.rank() == 0:
        for piece in mine:
            _paste(full, piece.name, piece.layout, piece.local.cpu())
    if group is None:
        return full
    tables = gather_json([describe(piece) for piece in mine], group, device)
    if group.rank() > 0:
        for piece in mine:
            dist.send(piece.local.to(device).contiguous(), group=group, group_dst=0)
        return None
    for rank, table in enumerate(tables[1:], start=1):
        for description in table:
            name, layout, dtype = understand(description)
            received = torch.empty(layout.local_shape, dtype=dtype, device=device)
            dist.recv(received, group=group, group_src=rank)
            _paste(full, name, layout, received.cpu())
    return full


def _paste(full: dict[str, Tensor], name: str, layout: Layout, local: Tensor) -> None:
    if name not in full:
        full[name] = torch.empty(layout.shape, dtype=local.dtype)
    layout.paste(local, full[name])


def describe(piece: TensorPiece) -> list[Any]:
    """Return name, layout and dtype of a piece as JSON, for `understand`."""
    return [piece.name, layout_to_json(piece.layout), str(piece.local.dtype).removeprefix("torch.")]


def understand(description: list[Any]) -> tuple[str, Layout, torch.dtype]:
    """Return name, layout and dtype of a piece that another worker described."""
    name, layout, dtype = description
    return name, layout_from_json(layout), getattr(torch, dtype)


def layout_to_json(layout: Layout) -> list[Any]:
    """Return a layout in a form that JSON can hold."""
    return [layout.shape, [[tile.offsets, tile.sizes, tile.start] for tile in layout.tiles], layout.nothing]


def layout_from_json(content: list[Any]) -> Layout:
    """Return the layout that `layout_to_json` was given."""
    shape, tiles, nothing = content
    found = tuple(Tile(tuple(o), tuple(n), tuple(s)) for o, n, s in tiles)
    return Layout(tuple(shape), found, None if nothing is None else tuple(nothing))
