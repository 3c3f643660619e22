"""Layout of a worker's part of a global tensor. Checkpoints, verification and export read and write by it.

A local tensor is a set of tiles. A tile is a box of the global tensor with the box of the local tensor that holds it:

    global (6, 4), rows [q q | k k | v v], tp=2, rank 1            local (3, 4)
        tile offsets (1, 0) sizes (1, 4)  <->  start (0, 0)
        tile offsets (3, 0) sizes (1, 4)  <->  start (1, 0)
        tile offsets (5, 0) sizes (1, 4)  <->  start (2, 0)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from torch import Tensor

Box = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Tile:
    """Box of a global tensor (`offsets`, `sizes`) that the local tensor holds from `start` on, with equal `sizes`."""

    offsets: Box
    sizes: Box
    start: Box

    def view(self, local: Tensor) -> Tensor:
        """Return the part of `local` that this tile is, as a view: writing to it fills the local tensor."""
        for dim, (start, size) in enumerate(zip(self.start, self.sizes, strict=True)):
            local = local.narrow(dim, start, size)
        return local


@dataclass(frozen=True, slots=True)
class Layout:
    """Shape of a global tensor and the tiles of it that are held here.

    Attributes:
        shape: shape of the global tensor.
        tiles: the boxes of it that are held here.
        nothing: shape of the local tensor if no tile is held: without rows, but cut along other dimensions.
    """

    shape: Box
    tiles: tuple[Tile, ...]
    nothing: Box | None = None

    @classmethod
    def whole(cls, shape: Sequence[int]) -> Layout:
        """Return the layout of a tensor that is held here whole."""
        shape = tuple(shape)
        return cls(shape, (Tile(shape and (0,) * len(shape), shape, (0,) * len(shape)),))

    @classmethod
    def split(cls, shape: Sequence[int], dim: int, spans: Sequence[int], rank: int, ranks: int) -> Layout:
        """Return the layout of part `rank` of `ranks` along `dim`.

        Each of the consecutive `spans` of `dim` is cut by itself.

        A fused query, key, value weight has three spans: each worker holds its heads of all three.
        """
        shape = tuple(shape)
        tiles = []
        span_start = local_start = 0
        for size in spans:
            part = size // ranks
            offsets, sizes, start = [0] * len(shape), list(shape), [0] * len(shape)
            offsets[dim], sizes[dim], start[dim] = span_start + rank * part, part, local_start
            tiles.append(Tile(tuple(offsets), tuple(sizes), tuple(start)))
            span_start += size
            local_start += part
        return cls(shape, tuple(tiles))

    @property
    def local_shape(self) -> Box:
        """Compute the shape of the local tensor that holds the tiles."""
        if not self.tiles:
            return (0, *self.shape[1:]) if self.nothing is None else self.nothing
        ends = [[s + n for s, n in zip(t.start, t.sizes, strict=True)] for t in self.tiles]
        return tuple(max(end) for end in zip(*ends, strict=True))

    @property
    def elements(self) -> int:
        """Count the elements held here."""
        return sum(prod(tile.sizes) for tile in self.tiles)

    def rows(self, start: int, stop: int) -> Layout:
        """Return the layout of the rows `start` to `stop` (first dimension) of the local tensor."""
        tiles = []
        for tile in self.tiles:
            first, last = max(start, tile.start[0]), min(stop, tile.start[0] + tile.sizes[0])
            if first < last:
                skipped = first - tile.start[0]
                tiles.append(
                    Tile(
                        (tile.offsets[0] + skipped, *tile.offsets[1:]),
                        (last - first, *tile.sizes[1:]),
                        (first - start, *tile.start[1:]),
                    )
                )
        return Layout(self.shape, tuple(tiles), None if tiles else (0, *self.local_shape[1:]))

    def cut(self, full: Tensor) -> Tensor:
        """Return the local tensor of a full one, as a new tensor that shares no memory with it."""
        local = full.new_empty(self.local_shape)
        for tile in self.tiles:
            source = full
            for dim, (offset, size) in enumerate(zip(tile.offsets, tile.sizes, strict=True)):
                source = source.narrow(dim, offset, size)
            tile.view(local).copy_(source)
        return local

    def paste(self, local: Tensor, full: Tensor) -> None:
        """Write the local tensor into its place in a full one."""
        for tile in self.tiles:
            target = full
            for dim, (offset, size) in enumerate(zip(tile.offsets, tile.sizes, strict=True)):
                target = target.narrow(dim, offset, size)
            target.copy_(tile.view(local))


@dataclass(frozen=True, slots=True)
class TensorPiece:
    """One worker's part of a named global tensor.

    Attributes:
        name: `model/<parameter or buffer>` or `optimizer/<parameter>/<state>`, equal under every strategy.
        local: the tensor held here; reading a checkpoint writes into it.
        layout: where `local` lies in the global tensor.
        writes: whether this worker writes the piece, if several workers hold it.
    """

    name: str
    local: Tensor
    layout: Layout
    writes: bool


@dataclass(frozen=True, slots=True)
class TensorPlacement:
    """Placement of one named tensor (parameter or buffer) on this worker.

    Attributes:
        tensor: the parameter or buffer itself; a DTensor under `fully_shard`.
        layout: where its local part lies in the global tensor.
        holders: number of workers that hold each element (1 if it is split over all of them).
        writes: whether this worker writes its part to a checkpoint.
        sharded: whether tensor parallelism split it.
    """

    tensor: Tensor
    layout: Layout
    holders: int
    writes: bool
    sharded: bool = False
