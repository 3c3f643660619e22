"""Weights in safetensors files, and modules that are built without memory for them: each worker reads only its part.

A model factory with an attribute `weights` gives a module whose parameters are on the meta device (its buffers are
there). The engines cut it as any other and read what they hold.
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
"""Bytes of an index at most."""

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"


class Weights(Protocol):
    """The values of parameters that are built without any."""

    def shape(self, name: str) -> tuple[int, ...]:
        """Of the tensor that parameter `name` is, without reading it."""
        ...

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of parameter `name` that starts at `offsets`; nothing else of it is read."""
        ...


@dataclass(frozen=True)
class StoredWeights:
    """Tensors in safetensors files.

    Attributes:
        files: tensor -> the file that holds it.
        keys: parameter or buffer of a module -> the tensor that it is; filled in by `named_for`.
    """

    files: dict[str, Path]
    keys: dict[str, str]

    @classmethod
    def of_folder(cls, folder: Path) -> StoredWeights | None:
        """Those of a Hugging Face folder: one file, or several with an index; None where there are none.

        Raises:
            WorkloadError: the index or a file of it cannot be read.
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

    def named_for(self, module: nn.Module, prefix: str) -> StoredWeights | str:
        """The same by the names of `module`; or what stands in the way: a parameter that is not in the files.

        Args:
            module: whose parameters are looked for. A tied one may be stored under any of its names.
            prefix: attribute that holds all of the model but its head; files may leave it out, or have it on top.
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
        """Of the tensor that parameter `name` is, without reading it."""
        key = self.keys[name]
        with safe_open(self.files[key], framework="pt") as file:
            return tuple(file.get_slice(key).get_shape())

    def read(self, name: str, offsets: Sequence[int], sizes: Sequence[int]) -> Tensor:
        """The box of parameter `name` that starts at `offsets`; nothing else of it is read."""
        key = self.keys[name]
        with safe_open(self.files[key], framework="pt") as file:
            if not sizes:
                whole: Tensor = file.get_tensor(key)
                return whole
            box = tuple(slice(start, start + size) for start, size in zip(offsets, sizes, strict=True))
            part: Tensor = file.get_slice(key)[box]
            return part


def _beside(folder: Path, file: str) -> Path:
    """A file that an index names. Raises WorkloadError: it is none of the same folder, or is not there."""
    if not isinstance(file, str) or file in ("", "..") or Path(file).name != file:
        raise WorkloadError(f"{folder / INDEX}: {file!r} is not the plain name of a file beside it")
    if not os.path.lexists(folder / file):
        raise WorkloadError(f"the weights in {str(folder)!r} are not whole: {file} is missing")
    return folder / file


def _names_in(path: Path) -> set[str]:
    """The tensors that a safetensors file holds. Raises WorkloadError where it is no regular file."""
    check_regular(path, WorkloadError)
    with safe_open(path, framework="pt") as file:
        return set(file.keys())


def _spellings(name: str, prefix: str) -> list[str]:
    shorter = [name.removeprefix(f"{prefix}.")] if name.startswith(f"{prefix}.") else []
    return [name, *shorter, f"{prefix}.{name}"]


@dataclass(frozen=True)
class StoredModel:
    """A model factory: what `build` makes, its parameters on the meta device and their values in `weights`.

    Buffers that are stored have their values: they are small, and every worker has them.
    """

    build: Callable[[], nn.Module]
    weights: StoredWeights

    def __call__(self) -> nn.Module:
        """Builds the module."""
        with without_parameters():
            module = self.build()
        for name, buffer in module.state_dict(keep_vars=True).items():
            if name in self.weights.keys and not isinstance(buffer, nn.Parameter):
                buffer.copy_(self.weights.read(name, (0,) * buffer.dim(), buffer.shape))
        return module


@contextmanager
def without_parameters() -> Iterator[None]:
    """Moves every parameter to the meta device as soon as a module has it. Buffers are as always."""
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
    """Where the parameters of the modules that `factory` builds are read from; None: they have their values."""
    found: Weights | None = getattr(factory, "weights", None)
    return found
