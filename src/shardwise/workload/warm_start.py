"""Warm start: the plain model of a workload begins with weights from safetensors files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import torch
from torch import Tensor, nn

from shardwise.errors import WorkloadError
from shardwise.workload.losses import with_loss
from shardwise.workload.weight_files import StoredWeights, without_parameters
from shardwise.workload.workload import WarmStart, Workload


def load_warm_start(model: nn.Module, workload: Workload) -> None:
    """Fill the parameters and persistent buffers of `model` from the workload's weights, if it names some.

    Raises:
        WorkloadError: the files cannot be read or do not fit the model, or the model has weight files of its own.
    """
    start = _start(workload)
    if start is None:
        return
    empty = next((name for name, parameter in model.named_parameters() if parameter.is_meta), None)
    if empty is not None:
        raise WorkloadError(
            f"{empty} of workload {workload.name!r} is read from files by the model already: leave out weights"
        )
    match = _match(model, workload, start)
    with torch.no_grad():
        for tensor, key in match.pairs:
            tensor.copy_(match.stored.tensor(key))


def check_warm_start(workload: Workload) -> None:
    """Compare the workload's weights with the model by names and shapes, without their values, if it names some.

    A model that cannot be built without values is left to the workers.

    Raises:
        WorkloadError: the files cannot be read or do not fit the model.
    """
    start = _start(workload)
    if start is None:
        return
    stored_weights(start)
    try:
        with torch.random.fork_rng(), without_parameters():
            model = with_loss(workload.model(), workload)
    except Exception:  # its own error, or an operation that needs values: a worker builds it with them
        return
    _match(model, workload, start)


def stored_weights(start: WarmStart) -> StoredWeights:
    """Find the files of a warm start. Raises WorkloadError if there are none."""
    path = Path(start.path).expanduser()
    stored = StoredWeights.of_folder(path) if path.is_dir() else StoredWeights.of_file(path)
    if stored is None:
        raise WorkloadError(f"weights={path}: the folder has no model.safetensors: give a safetensors file or a folder")
    return stored


def _start(workload: Workload) -> WarmStart | None:
    given = workload.weights
    return given if given is None or isinstance(given, WarmStart) else WarmStart(path=given)


@dataclass(frozen=True)
class _Match:
    """Tensors of a model with the names under which their values are stored."""

    stored: StoredWeights
    pairs: list[tuple[Tensor, str]]


def _match(model: nn.Module, workload: Workload, start: WarmStart) -> _Match:
    stored = stored_weights(start)
    used: set[str] = set()
    pairs = []
    for names, tensor in _tensors(model):
        keys = [key for name in names if (key := _key(name, start)) in stored.files]
        used.update(keys)
        problem = _problem(names[0], tensor, keys, stored)
        if not problem:
            pairs.append((tensor, keys[0]))
        elif not any(_allowed(name, start) for name in names):
            raise _unlike(workload, start, problem)
    left = next((key for key in stored.files if key not in used and not _allowed(start.prefix + key, start)), None)
    if left is not None:
        raise _unlike(workload, start, f"{left} in the file is not in the model")
    if not pairs:
        raise _unlike(workload, start, "no tensor of the model is in the file")
    return _Match(stored, pairs)


def _tensors(model: nn.Module) -> Iterator[tuple[list[str], Tensor]]:
    """Yield each parameter and persistent buffer once, with all its names."""
    named: dict[int, tuple[list[str], Tensor]] = {}
    state: Mapping[str, Tensor] = model.state_dict(keep_vars=True)
    for name, tensor in state.items():
        named.setdefault(id(tensor), ([], tensor))[0].append(name)
    yield from named.values()


def _key(name: str, start: WarmStart) -> str:
    """Return the name in the file of a tensor of the model; no file has an empty name."""
    return name.removeprefix(start.prefix) if name.startswith(start.prefix) else ""


def _allowed(name: str, start: WarmStart) -> bool:
    return any(fnmatchcase(name, pattern) for pattern in start.allow_missing)


def _problem(name: str, tensor: Tensor, keys: list[str], stored: StoredWeights) -> str:
    if not keys:
        return f"{name} of the model is not in the file"
    there, here = stored.shape_of(keys[0]), tuple(tensor.shape)
    return "" if there == here else f"{name} is stored with shape {there}, the model has {here}"


def _unlike(workload: Workload, start: WarmStart, problem: str) -> WorkloadError:
    return WorkloadError(
        f"weights={start.path} do not fit the model of workload {workload.name!r}: {problem}; name what may differ in "
        "WarmStart(allow_missing=(pattern, ...)), or the start of the model's names in prefix"
    )
