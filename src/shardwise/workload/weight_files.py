"""Weights in safetensors files, and modules that are built without memory for them: each worker reads only its part.

A model factory with an attribute `weights` builds a module whose parameters are on the meta device; its buffers have
values. The engines split it like any other module and read the parameters that they hold.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from safetensors import safe_open
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.files import check_regular, read_regular

LARGEST_INDEX = 256 << 20
"""Largest size of an index file in bytes."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Protocol):
    """Source of the values of parameters that are built without memory."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of parameter `name` without reading its values."""
        ...

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read the box of parameter `name` that starts at `offsets` and has `sizes`, and nothing else of it."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """Tensors in safetensors files.

    Attributes:
        files: map from a tensor to the file that holds it.
        keys: map from a module's parameter or buffer to its tensor; filled in by `named_for`.
    """

    files: dict[str, Path]
    keys: dict[str, str]

    @classmethod
    def of_folder(cls, folder: Path) -> StoredWeights | None:
        """Find the weights of a Hugging Face folder: one file, or several with an index. Returns None without any.

        Raises:
            WorkloadError: the index or one of its files cannot be read.
        """
        try:
            if (folder / INDEX).exists():
                text = read_regular(folder / INDEX, LARGEST_INDEX, WorkloadError)
                index = dict(json.loads(text)["weight_map"])
            elif (folder / SINGLE).exists():
                index = dict.fromkeys(_names_in(folder / SINGLE), SINGLE)
            else:
                return None
            known = {file: _names_in(_beside(folder, file)) for file in dict.fromkeys(index.values())}
        except WorkloadError:
            raise
        except Exception as error:
            raise WorkloadError(f"the weights in {str(folder)!r} cannot be read: {error}") from error
        missing = next((name for name, file in index.items() if name not in known[file]), None)
        if missing is not None:
            raise WorkloadError(f"the weights in {str(folder)!r} are not whole: {index[missing]} has no {missing}")
        return cls({name: folder / file for name, file in index.items()}, {})

    @classmethod
    def of_file(cls, path: Path) -> StoredWeights:
        """Read the names of the tensors in one safetensors file. Raises WorkloadError if it cannot be read."""
        try:
            return cls(dict.fromkeys(_names_in(path), path), {})
        except WorkloadError:
            raise
        except Exception as error:
            raise WorkloadError(f"{path} cannot be read as a safetensors file: {error}") from error

    def named_for(self, module: nn.Module, prefix: str) -> StoredWeights | str:
        """Return these weights under the names of `module`, or the name of a parameter that is not in the files.

        Args:
            module: module whose parameters are looked up. A tied parameter may be stored under any of its names.
            prefix: attribute that holds all of the model but its head; names in files may lack it or have it in
                addition.
        """
        names: dict[int, list[str]] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            names.setdefault(id(parameter), []).append(name)
        keys = {}
        for same in names.values():
            stored = [key for name in same for key in _spellings(name, prefix) if key in self.files]
            if not stored:
                return same[0]
            keys.update(dict.fromkeys(same, stored[0]))
        for name in module.state_dict().keys() - keys.keys():  # persistent buffers
            key = next((key for key in _spellings(name, prefix) if key in self.files), None)
            if key is not None:
                keys[name] = key
        return StoredWeights(self.files, keys)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of parameter `name` without reading its values."""
        return self.shape_of(self.keys[name])

    def shape_of(self, key: str) -> tuple[int, ...]:
        """Return the shape of the stored tensor `key` without reading its values."""
        with safe_open(self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def tensor(self, key: str) -> Tensor:
        """Read the whole stored tensor `key`."""
        with safe_open(self.files[key], framework="pt") as file:
            whole: Tensor = file.get_tensor(key)
            return whole

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """Read the box of parameter `name` that starts at `offsets` and has `sizes`, and nothing else of it."""
        key = self.keys[name]
        if not sizes:
            return self.tensor(key)
        with safe_open(self.files[key], framework="pt") as file:
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            part: Tensor = file.get_slice(key)[box]
            return part


def _beside(folder: Path, file: str) -> Path:
    """Return the path of an index's file. Raises WorkloadError if it is not in the index's folder or is missing."""
    if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
        raise WorkloadError(f"{folder / INDEX}: {file!r} is not the plain name of a file beside it")
    if not os.path.lexists(folder / file):
        raise WorkloadError(f"the weights in {str(folder)!r} are not whole: {file} is missing")
    return folder / file


def _names_in(path: Path) -> set[str]:
    """Return the names of the tensors in a safetensors file. Raises WorkloadError if it is not a regular file."""
    check_regular(path, WorkloadError)
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _spellings(name: str, prefix: str) -> list[str]:
    shorter = [name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else []
    return [name, *shorter, f"{prefix}.{name}"]


@dataclass(frozen=True)
class StoredModel:
    """Model factory that builds parameters on the meta device and has their values in `weights`.

    Stored buffers are read at once: they are small, and every worker needs them.
    """

    build: Callable[[], nn.Module]
    weights: StoredWeights

    def __call__(self) -> nn.Module:
        """Build the module with parameters on meta, and read its stored buffers."""
        with without_parameters():
            module = self.build()
        for name, buffer in module.state_dict(keep_vars=True).items():
            if name in self.weights.keys and not isinstance(buffer, nn.Parameter):
                buffer.copy_(self.weights.read(name, (0,) * buffer.dim(), buffer.shape))
        return module


@contextmanager
def without_parameters() -> Iterator[None]:
    """Move every parameter to the meta device as soon as a module registers it; buffers are unaffected."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None and not parameter.is_meta:
            parameter = nn.Parameter(parameter.to("meta"), parameter.requires_grad)
        register(module, name, parameter)

    nn.Module.register_parameter = on_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]


def weights_of(factory: Any) -> Weights | None:
    """Return the weights to read for the modules that `factory` builds. Returns None if these have values."""
    found: Weights | None = getattr(factory, "weights", None)
    return found
