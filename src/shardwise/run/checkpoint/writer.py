"""Writer for torch's distributed checkpoint: safetensors files and a JSON index instead of pickles.

Every worker plans on its own, because each piece says which worker writes it. Plans are never gathered, which would
unpickle them; workers meet only to agree that all have written. Steps of a save, on all workers:

    stage       copy the tensors that this worker writes to buffers; training goes on after it
    set up      rank 0 makes the partial folder
    write       write this worker's file, until it is on disk
    finish      rank 0 reads the headers of all files, writes index and manifest, renames the folder into place
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from io import BytesIO
from json import dumps, loads
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.staging import AsyncStager
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from shardwise.errors import ShardwiseError
from shardwise.parallel.state.layout import Box, Layout, TensorPiece, Tile
from shardwise.run.checkpoint.checked_file import FileSum, write_file
from shardwise.run.checkpoint.folder import begin, hidden_path, prune, publish, write_manifest
from shardwise.run.checkpoint.index import INDEX, Chunk, Index, Stored, chunk_key, merge_files, tensors_metadata
from shardwise.run.checkpoint.safetensors_file import TensorSpec, write_tensors
from shardwise.run.control_group import Workers
from shardwise.run.training.run_folder import note_checkpoint

PIECES = "pieces"
"""Only key of the dicts that torch passes around: it logs a line for each key, which takes longer than a copy."""


def stored_tiles(layout: Layout) -> list[Tile]:
    """Return the tiles to store as chunks: tiles with elements, and the tile of a tensor without any elements."""
    return [tile for tile in layout.tiles if prod(tile.sizes) or not prod(layout.shape)]


@dataclass(frozen=True, slots=True)
class Staged:
    """Part of a global tensor that this worker writes: its full shape, and copies of tiles by their offsets."""

    shape: Box
    tiles: dict[Box, Tensor]


class Stager(AsyncStager):
    """Stager that copies the pieces of this worker to buffers in main memory, and reuses them for each checkpoint."""

    _synchronize_after_execute = False

    def __init__(self) -> None:
        self._buffers: dict[tuple[str, Box], Tensor] = {}

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """Copy a list of pieces, and return a dict of `Staged` by name; both are under the key `PIECES`.

        The copies are done when it returns.
        """
        pieces: list[TensorPiece] = [piece for piece in state_dict[PIECES] if piece.writes]
        earlier, self._buffers = self._buffers, {}
        staged = {piece.name: Staged(piece.layout.shape, self._copy(piece, earlier)) for piece in pieces}
        if any(piece.local.is_cuda for piece in pieces):
            torch.cuda.synchronize()
        return {PIECES: staged}

    def synchronize_staging(self) -> None:
        """Do nothing: copies are done when `stage` returns."""
        return

    def close(self) -> None:
        """Free the buffers."""
        self._buffers.clear()

    def _copy(self, piece: TensorPiece, earlier: dict[tuple[str, Box], Tensor]) -> dict[Box, Tensor]:
        local = piece.local.detach()
        for tile in stored_tiles(piece.layout):
            key = (piece.name, tile.offsets)
            buffer = earlier.get(key)
            if buffer is None or (buffer.dtype, tuple(buffer.shape)) != (local.dtype, tile.sizes):
                buffer = torch.empty(tile.sizes, dtype=local.dtype, pin_memory=local.is_cuda)
            self._buffers[key] = buffer.copy_(tile.view(local), non_blocking=True)
        return {tile.offsets: self._buffers[piece.name, tile.offsets] for tile in stored_tiles(piece.layout)}


class TileSavePlanner(SavePlanner):
    """Planner of the writes: one for each tile that `Stager` copied."""

    def set_up_planner(
        self, state_dict: dict[str, Any], storage_meta: StorageMeta | None = None, is_coordinator: bool = False
    ) -> None:
        """Take the staged tiles from `state_dict`, which is the result of `Stager.stage`."""
        self._staged: dict[str, Staged] = state_dict[PIECES]

    def create_local_plan(self) -> SavePlan:
        """Plan the tiles that this worker writes."""
        return SavePlan([_write_item(n, s.shape, o, t) for n, s in self._staged.items() for o, t in s.tiles.items()])

    def create_global_plan(self, all_plans: list[SavePlan]) -> tuple[list[SavePlan], Metadata]:
        """Return the plans unchanged and empty metadata: workers write independently, and the index replaces it."""
        return all_plans, Metadata({})

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        """Return the local plan unchanged."""
        return new_plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | BytesIO:
        """Return the copy of the tile that `write_item` refers to."""
        return self._staged[write_item.index.fqn].tiles[tuple(write_item.index.offset or ())]


def _write_item(name: str, shape: Box, offsets: Box, tensor: Tensor) -> WriteItem:
    chunk = ChunkStorageMetadata(torch.Size(offsets), tensor.shape)
    data = TensorWriteData(chunk, TensorProperties(dtype=tensor.dtype), torch.Size(shape))
    return WriteItem(MetadataIndex(name, chunk.offsets), WriteItemType.SHARD, tensor_data=data)


class FolderWriter(StorageWriter):
    """Writer of one checkpoint; every method is called on all workers, in the background.

    A worker that fails still meets the others, and then all raise the first failure, so that none is left waiting.

    Attributes:
        final: path of the complete folder.
        index: index of the checkpoint, without tensors.
        keep: number of checkpoints to keep.
        workers: group of the workers that write.
        protected: steps whose checkpoints are kept in addition.
    """

    def __init__(
        self, final: Path, index: Index, keep: int, workers: Workers, protected: frozenset[int] = frozenset()
    ) -> None:
        self.final, self.index, self.keep, self.workers, self.protected = final, index, keep, workers, protected
        self._written: FileSum | None = None
        self._problem = ""

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Do nothing: there is one writer for each checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Make the partial folder on rank 0, before any worker writes to it. Collective. Raises ShardwiseError."""
        if self.workers.rank == 0:
            try:
                begin(self.final)
            except OSError as error:
                self._problem = self._says(error)
        self.workers.raise_first(self._problem, ShardwiseError)

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """Return the plan unchanged."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """Return the plans unchanged."""
        return plans

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Write this worker's file, which is on disk when it returns; `finish` raises a failure on all workers."""
        try:
            self._written = self._write(plan, planner) if plan.items else None
        except Exception as error:
            self._problem = self._says(error)
        done: Future[list[WriteResult]] = Future()
        done.set_result([])
        return done

    def _write(self, plan: SavePlan, planner: SavePlanner) -> FileSum:
        path = self._file(self.workers.rank)
        stored = stored_by(plan, path.name)
        items = {_key(item): item for item in plan.items}
        specs = {
            chunk.key: TensorSpec(entry.spec.dtype, chunk.sizes) for entry in stored.values() for chunk in entry.chunks
        }

        def read(key: str) -> Tensor:
            tensor = planner.resolve_data(items[key])
            assert isinstance(tensor, Tensor)
            return tensor

        return write_tensors(path, specs, read, tensors_metadata(stored))

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Complete the checkpoint on rank 0 once all workers have written. Collective.

        Raises:
            ShardwiseError: a worker could not write, or rank 0 could not complete the checkpoint.
        """
        written = self._written
        report = {"problem": self._problem, "file": None if written is None else [written.bytes, written.crc32]}
        reports = [loads(text) for text in self.workers.exchange(dumps(report))]
        for problem in filter(None, (entry["problem"] for entry in reports)):
            raise ShardwiseError(problem)
        if self.workers.rank == 0:
            try:
                self._complete({r: FileSum(*entry["file"]) for r, entry in enumerate(reports) if entry["file"]})
            except Exception as error:
                self._problem = self._says(error)
        self.workers.raise_first(self._problem, ShardwiseError)

    def _complete(self, sums: dict[int, FileSum]) -> None:
        """Write index and manifest of the workers' files, rename the folder into place, and delete old checkpoints.

        Args:
            sums: size and CRC-32 of each worker's file, by rank.
        """
        for rank, entry in sums.items():
            if not self._file(rank).exists() or self._file(rank).stat().st_size != entry.bytes:
                name = self._file(rank).name
                raise ShardwiseError(f"{name} is not to be seen there: all workers must share the file system")
        partial = hidden_path(self.final, "partial")
        index = replace(self.index, tensors=merge_files(self._file(rank) for rank in sums))
        files = {self._file(rank).name: entry for rank, entry in sums.items()}
        files[INDEX] = write_file(partial / INDEX, iter([index.text().encode()]))
        write_manifest(partial, files)
        publish(self.final)
        note_checkpoint(self.final.parents[1], int(self.index.state.get("steps", 0)))
        prune(self.final, self.keep, self.protected)

    def _file(self, rank: int) -> Path:
        return hidden_path(self.final, "partial") / f"rank-{rank:05d}.safetensors"

    def _says(self, error: Exception) -> str:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"checkpoint {self.final} could not be written by worker {self.workers.rank}: {reason}"

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Return False, so that torch never chooses this class by a path."""
        return False


def _key(item: WriteItem) -> str:
    data = item.tensor_data
    assert data is not None
    return chunk_key(item.index.fqn, tuple(data.chunk.offsets), data.chunk.sizes == data.size)


def stored_by(plan: SavePlan, file: str) -> dict[str, Stored]:
    """Return the tensors of a worker's plan by name, each with only that worker's chunks, which are all in `file`."""
    stored: dict[str, Stored] = {}
    for item in plan.items:
        data = item.tensor_data
        assert data is not None
        chunk = Chunk(file, _key(item), tuple(data.chunk.offsets), tuple(data.chunk.sizes))
        spec = TensorSpec(data.properties.dtype, tuple(data.size))
        earlier = stored.get(item.index.fqn, Stored(spec, ()))
        stored[item.index.fqn] = Stored(spec, (*earlier.chunks, chunk))
    return stored
