"""Reader for torch's distributed checkpoint: reads only the slices that a worker holds, directly into its tensors."""

from __future__ import annotations

import os
from collections import defaultdict
from io import BytesIO
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from shardwise.parallel.state.layout import Box, TensorPiece
from shardwise.run.checkpoint.index import Chunk, Index
from shardwise.run.checkpoint.writer import PIECES, stored_tiles


class TileLoadPlanner(LoadPlanner):
    """Planner of the reads: one per overlap of a tile of this worker with a stored chunk, directly into the tile."""

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the list of pieces from `state_dict`, and make views of their tiles."""
        assert metadata is not None
        self._stored = metadata.state_dict_metadata
        self._pieces: list[TensorPiece] = state_dict[PIECES]
        self._views = {
            MetadataIndex(piece.name, torch.Size(tile.offsets)): tile.view(piece.local.detach())
            for piece in self._pieces
            for tile in stored_tiles(piece.layout)
        }

    def create_local_plan(self) -> LoadPlan:
        """Plan the slices that this worker reads."""
        items: list[ReadItem] = []
        for piece in self._pieces:
            stored = self._stored[piece.name]
            assert isinstance(stored, TensorStorageMetadata)
            assert tuple(stored.size) == piece.layout.shape, piece.name
            boxes = [(torch.Size(tile.offsets), torch.Size(tile.sizes)) for tile in stored_tiles(piece.layout)]
            items += create_read_items_for_chunk_list(piece.name, stored, [ChunkStorageMetadata(*box) for box in boxes])
        return LoadPlan([item for item in items if prod(item.lengths)])

    def create_global_plan(self, global_plan: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged: workers read independently of each other."""
        return global_plan

    def finish_plan(self, central_plan: LoadPlan) -> LoadPlan:
        """Return the local plan unchanged."""
        return central_plan

    def load_bytes(self, read_item: ReadItem, value: BytesIO) -> None:
        """Refuse to load bytes; never called, because checkpoints have tensors and JSON only."""
        raise NotImplementedError

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        """Return a view of the part of the tile that `read_item` fills."""
        view = self._views[read_item.dest_index]
        for dim, (start, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(dim, start, length)
        return view

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Do nothing: `resolve_tensor` returned a view, so the data is in place."""


class FolderReader(StorageReader):
    """Reader of a complete checkpoint; it reads only the slices that a plan asks for."""

    def __init__(self, folder: Path, index: Index) -> None:
        self.folder, self.index = folder, index

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: there is one reader for each checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Return the index in the form of torch's metadata."""
        tensors: dict[str, Any] = {}
        places: dict[MetadataIndex, Chunk] = {}
        for name, stored in self.index.tensors.items():
            chunks = [ChunkStorageMetadata(torch.Size(c.offsets), torch.Size(c.sizes)) for c in stored.chunks]
            properties = TensorProperties(dtype=stored.spec.dtype)
            tensors[name] = TensorStorageMetadata(properties, torch.Size(stored.spec.shape), chunks)
            places |= {MetadataIndex(name, torch.Size(chunk.offsets)): chunk for chunk in stored.chunks}
        return Metadata(tensors, storage_data=places)

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Take the locations of the chunks from the metadata."""
        self._places: dict[MetadataIndex, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """Return the plans unchanged."""
        return plans

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Copy every slice of the plan into its tile; the copies are done when it returns."""
        by_file: dict[str, list[tuple[Chunk, ReadItem]]] = defaultdict(list)
        for item in plan.items:
            chunk = self._places[item.storage_index]
            by_file[chunk.file].append((chunk, item))
        for name, reads in by_file.items():
            with safe_open(self.folder / name, "pt") as file:
                for chunk, item in reads:
                    view = planner.resolve_tensor(item)
                    view.copy_(read_slice(file, chunk.key, tuple(item.storage_offsets), tuple(item.lengths)))
                    planner.commit_tensor(item, view)
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False, so that torch never chooses this class by a path."""
        return False


def read_slice(file: Any, key: str, offsets: Box, sizes: Box) -> Tensor:
    """Read a box of the stored tensor `key`; only the bytes of the box are read."""
    box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
    tensor: Tensor = file.get_slice(key)[box]
    return tensor
