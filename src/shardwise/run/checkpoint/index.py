"""Index of a checkpoint: its tensors, and the file in which each chunk of them is stored."""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Container, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from shardwise.errors import CheckpointError, ShardwiseError
from shardwise.parallel.state.layout import Box
from shardwise.run.checkpoint.cover import MOST_DIMENSIONS, cover_problem
from shardwise.run.checkpoint.folder import MOST_BYTES, check_file, read_manifest
from shardwise.run.checkpoint.safetensors_file import DTYPES, TensorSpec
from shardwise.run.jsonfile import entry, read_json, short

INDEX = "index.json"
FORMAT = 1
_FILE = re.compile(r"rank-[0-9]{5,}\.safetensors")
_MOST_ELEMENTS = 1 << 58
_LONGEST_NAME = 500
_TENSORS = "tensors"
_REST = ("progress", "state", "aliases", "optimizer", "random")


@dataclass(frozen=True, slots=True)
class Chunk:
    """Box of a global tensor at `offsets` with `sizes`, stored as one tensor under `key` in `file`."""

    file: str
    key: str
    offsets: Box
    sizes: Box


@dataclass(frozen=True, slots=True)
class Stored:
    """Global tensor in a checkpoint, and the chunks that cover it."""

    spec: TensorSpec
    chunks: tuple[Chunk, ...]


@dataclass(frozen=True, slots=True)
class Index:
    """Everything in a checkpoint except the values of its tensors.

    Attributes:
        tensors: tensors by name: `model/<parameter or buffer>`, `average/<parameter>`, `owed/<parameter>`,
            `optimizer/<parameter>/<state>`. Of replicas that take local steps they are the means, and
            `replica/<index>/<name>` is that of one of them, `outer/<parameter>/<state>` is of their outer optimizer.
        aliases: further name of a tied tensor -> the name under which it is stored, both without `model/`.
        progress: progress that was given to `Checkpoints.save`.
        state: state of the program besides tensors: steps, schedule.
        optimizer: class name of the optimizer; empty if there was none.
        random: state of torch's CPU random number generator, hexadecimal.
    """

    tensors: dict[str, Stored]
    aliases: dict[str, str] = field(default_factory=dict)
    progress: dict[str, Any] = field(default_factory=dict)
    state: dict[str, Any] = field(default_factory=dict)
    optimizer: str = ""
    random: str = ""

    def of_replica(self, number: int | None) -> Index:
        """Return the index in which each tensor is that of one of several replicas, where it is stored.

        None returns this index: its tensors are the means of replicas.
        """
        if number is None:
            return self
        own = f"replica/{number}/"
        apart = {name.removeprefix(own): stored for name, stored in self.tensors.items() if name.startswith(own)}
        # another replica may have state of its optimizer that this one has not
        rest = {name: stored for name, stored in self.tensors.items() if not name.startswith("optimizer/")}
        return replace(self, tensors={**rest, **apart})

    @classmethod
    def read(cls, folder: Path) -> Index:
        """Read and check the index of a complete checkpoint: types of values, and chunks that cover tensors exactly.

        Raises:
            CheckpointError: the index is damaged, or of a format that this version does not know.
        """
        files = read_manifest(folder)
        check_file(folder, INDEX)
        content = read_json(folder / INDEX, MOST_BYTES, CheckpointError, "index")
        try:
            known = entry(content, "format", int)
            if known == FORMAT:
                return _parsed(content, files)
        except ValueError as error:
            raise CheckpointError(f"checkpoint {folder} is damaged: {INDEX}: {error}") from None
        raise CheckpointError(
            f"checkpoint {folder} is of format {known}, this version reads {FORMAT}: "
            "use the version of Shardwise that wrote it"
        )

    def text(self) -> str:
        """Return the index as JSON text for `read`. Raises TypeError if `progress` or `state` are not JSON-able."""
        rest = {key: getattr(self, key) for key in _REST}
        return json.dumps({"format": FORMAT, **rest, "tensors": _to_json(self.tensors)})


def chunk_key(name: str, offsets: Box, whole: bool) -> str:
    """Return the name of a chunk in its file: the tensor's name, plus the offsets unless it is the whole tensor."""
    return name if whole else f"{name}@{','.join(map(str, offsets))}"


def tensors_metadata(tensors: Mapping[str, Stored]) -> dict[str, str]:
    """Return metadata for the header of a worker's file that locates its chunks; it saves the sync of another file."""
    return {_TENSORS: json.dumps(_to_json(tensors))}


def merge_files(paths: Iterable[Path]) -> dict[str, Stored]:
    """Collect the tensors in the files of all workers of one checkpoint, by name.

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
        if problem := cover_problem(stored.spec.shape, [(chunk.offsets, chunk.sizes) for chunk in stored.chunks]):
            raise ShardwiseError(f"{name} {problem}")
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


def _parsed(content: Mapping[str, Any], files: Collection[str]) -> Index:
    """Build the index from a JSON document, and check that its chunks lie in `files`. Raises ValueError."""
    index = Index(
        _from_json(entry(content, "tensors", dict)),
        aliases=entry(content, "aliases", dict),
        progress=entry(content, "progress", dict),
        state=entry(content, "state", dict),
        optimizer=entry(content, "optimizer", str),
        random=entry(content, "random", str),
    )
    for name in (*index.tensors, *index.aliases, index.optimizer or "none"):
        header = name.endswith("__metadata__")  # safetensors files have their metadata under this name
        if header or not name.isprintable() or not 0 < len(name) <= _LONGEST_NAME:
            raise ValueError(f"{short(name)} cannot be a name")
    for name, stored in index.tensors.items():
        _check_stored(name, stored, files)
    if unused := set(files) - {INDEX, *(chunk.file for stored in index.tensors.values() for chunk in stored.chunks)}:
        raise ValueError(f"it says nothing of {min(unused)}")
    for alias, target in index.aliases.items():
        if type(target) is not str or f"model/{target}" not in index.tensors or f"model/{alias}" in index.tensors:
            raise ValueError(f"{short(alias)} is a further name of {short(target)}, which cannot be")
    return index


def _check_stored(name: str, stored: Stored, files: Container[str]) -> None:
    """Check that a tensor's name, chunks and files are such as a training writes. Raises ValueError."""
    kind, _, rest = name.partition("/")
    if kind not in ("model", "average", "owed", "optimizer", "outer", "replica", "delayed") or not rest:
        raise ValueError(f"{short(name)} is the name of no tensor")
    if problem := cover_problem(stored.spec.shape, [(chunk.offsets, chunk.sizes) for chunk in stored.chunks]):
        raise ValueError(f"{short(name)} {problem}")
    for chunk in stored.chunks:
        if not _FILE.fullmatch(chunk.file) or chunk.file not in files:
            raise ValueError(f"{short(chunk.file)} is no file of this checkpoint")
        if chunk.key != chunk_key(name, chunk.offsets, chunk.sizes == stored.spec.shape):
            raise ValueError(f"{short(chunk.key)} is not what a part of {short(name)} is called")


def _from_json(content: Mapping[str, Any]) -> dict[str, Stored]:
    """Build tensors from their JSON form. Raises ValueError if a value has a wrong type."""
    return {
        name: Stored(
            TensorSpec(_dtype(entry(tensor, "dtype", str)), _box(tensor, "shape")),
            tuple(_chunk(part) for part in entry(tensor, "chunks", list)),
        )
        for name, tensor in content.items()
    }


def _chunk(part: object) -> Chunk:
    return Chunk(entry(part, "file", str), entry(part, "key", str), _box(part, "offsets"), _box(part, "sizes"))


def _box(content: object, key: str) -> Box:
    values = entry(content, key, list)
    if len(values) > MOST_DIMENSIONS or any(type(value) is not int or value < 0 for value in values):
        raise ValueError(f"{key!r} is {short(values)} and not a list of sizes")
    if prod(max(value, 1) for value in values) > _MOST_ELEMENTS:
        raise ValueError(f"{key!r} is {short(values)}, more than any memory holds")
    return tuple(values)


def _dtype(name: str) -> torch.dtype:
    if name not in DTYPES:
        raise ValueError(f"{short(name)} is no dtype of a checkpoint")
    return DTYPES[name]
