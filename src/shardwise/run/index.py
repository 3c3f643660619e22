"""What a checkpoint holds: which tensors there are, and in which file each part of them lies."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.parallel.layout import Box
from shardwise.run.tensorfile import TensorSpec

INDEX = "index.json"
FORMAT = 1
_TENSORS = "tensors"
_REST = ("progress", "state", "aliases", "optimizer", "random")


@dataclass(frozen=True, slots=True)
class Chunk:
    """A box of a global tensor, stored whole under `key` in `file`."""

    file: str
    key: str
    offsets: Box
    sizes: Box


@dataclass(frozen=True, slots=True)
class Stored:
    """A global tensor in a checkpoint and the boxes that make it up."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Everything about a checkpoint but the values of its tensors.

    Attributes:
        tensors: by name: `model/<parameter or buffer>`, `optimizer/<parameter>/<state>`.
        aliases: further names of tied tensors -> the name that is stored, both without `model/`.
        progress: what `Checkpoints.save` was given.
        state: of the program that is not tensors: steps, schedule.
        optimizer: class of the optimizer; empty where there was none.
        random: state of torch's CPU generator, hexadecimal.
    """

    tensors: dict[str, Stored]
    aliases: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    optimizer: str = ""
    random: str = ""

    @classmethod
    def read(cls, folder: Path) -> Index:
        """The index of a complete checkpoint.

        Raises:
            CheckpointError: it is of a format that this version does not know.
        """
        content = json.loads((folder / INDEX).read_bytes())
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"checkpoint {folder} is of format {content['format']}, this version reads {FORMAT}: "
                "use the version of Shardwise that wrote it"
            )
        rest = {key: content[key] for key in _REST}
        return cls(_from_json(content["tensors"]), **rest)

    def text(self) -> str:
        """JSON, which `read` reads. Raises TypeError where `progress` or `state` are not JSON-able."""
        rest = {key: getattr(self, key) for key in _REST}
        return json.dumps({"format": FORMAT, **rest, "tensors": _to_json(self.tensors)})


def chunk_key(name: str, offsets: Box, whole: bool) -> str:
    """The name of a chunk in its file: that of the tensor, with the place where it is only a part."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


def tensors_metadata(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """The header of a worker's file that says where its chunks belong: a file of its own would be one more to sync."""
    return {_TENSORS: json.dumps(_to_json(tensors))}


def merge_files(paths: Iterable[Path]) -> dict[str, Stored]:
    """All tensors in the files of the workers of one checkpoint.

    Raises:
        ShardwiseError: the files do not hold every element of a tensor exactly once.
    """
    tensors: dict[str, Stored] = {}
    for path in paths:
        with safe_open(path, "pt") as file:
            part = _from_json(json.loads(file.metadata()[_TENSORS]))
        for name, stored in part.items():
            earlier = tensors.setdefault(name, Stored(stored.spec, ()))
            if stored.spec != earlier.spec:
                raise ShardwiseError(f"workers disagree on {name}: {earlier.spec} and {stored.spec}")
            tensors[name] = Stored(stored.spec, (*earlier.chunks, *stored.chunks))
    for name, stored in tensors.items():
        _check_cover(name, stored)
    return tensors


def _to_json(tensors: Mapping[str, Stored]) -> dict[str, Any]:
    return {
        name: {
            "dtype": str(stored.spec.dtype).removeprefix("torch."),
            "shape": stored.spec.shape,
            "chunks": [{"file": c.file, "key": c.key, "offsets": c.offsets, "sizes": c.sizes} for c in stored.chunks],
        }
        for name, stored in sorted(tensors.items())
    }


def _from_json(content: Mapping[str, Any]) -> dict[str, Stored]:
    return {
        name: Stored(
            TensorSpec(_dtype(entry["dtype"]), tuple(entry["shape"])),
            tuple(Chunk(c["file"], c["key"], tuple(c["offsets"]), tuple(c["sizes"])) for c in entry["chunks"]),
        )
        for name, entry in content.items()
    }


def _check_cover(name: str, stored: Stored) -> None:
    """Counts elements and places, which finds a part that nobody or two wrote."""
    written = sum(prod(chunk.sizes) for chunk in stored.chunks)
    places = {chunk.offsets for chunk in stored.chunks}
    if written != prod(stored.spec.shape) or len(places) != len(stored.chunks):
        raise ShardwiseError(
            f"{name} has {prod(stored.spec.shape)} elements, the workers wrote {written} in {len(stored.chunks)} parts"
        )


def _dtype(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise CheckpointError(f"{name!r} is not a dtype of torch {torch.__version__}")
    return dtype
