"""The weights of a Hugging Face folder: which file they come from, and the model factory that reads them.

Only safetensors files are read, because other formats are pickled. Each worker reads the part that it holds, unless
transformers has to rename or join tensors, or to initialise a head that the files lack.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import nn

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.packages import require
from shardwise.workload.recipes.pretrained.architecture import Architecture
from shardwise.workload.weight_files import SINGLE, StoredModel, StoredWeights

_OTHER_FORMATS = (
    "pytorch_model*.bin",
    "*.safetensors",
    "tf_model.h5",
    "flax_model.msgpack",
    "*.gguf",
    "*.ckpt",
    "consolidated*.pth",
)
"""Patterns of files with weights that are not read."""


@dataclass(frozen=True)
class WeightOrigin:
    """A model factory, and where its weights come from.

    Attributes:
        factory: builds the model.
        stored: whether the weights come from files.
        notes: lines for the user.
    """

    factory: Callable[[], nn.Module]
    stored: bool
    notes: tuple[str, ...]


def origin_of(architecture: Architecture, *, random: bool) -> WeightOrigin:
    """Return the factory of a folder's model, with the weights of the folder's safetensors files or random ones.

    Args:
        architecture: the model.
        random: take random weights even if the folder has some.

    Raises:
        WorkloadError: the folder has weights that cannot be read, or its files lack a part of the model.
    """
    folder = architecture.folder
    if random:
        return WeightOrigin(architecture.build, False, ("weights: random, as asked for (weights=random)",))
    weights = StoredWeights.of_folder(folder)
    if weights is None:
        _refuse_other_formats(architecture)
        return WeightOrigin(architecture.build, False, (f"weights: random, because {folder} holds no weights",))
    files = sorted({path.name for path in weights.files.values()})
    source = str(folder / files[0]) if len(files) == 1 else f"{folder / files[0]} and {len(files) - 1} more files"
    model = StoredModel(architecture.build, weights)()
    named = weights.named_for(model, getattr(model, "base_model_prefix", ""))
    if isinstance(named, StoredWeights):
        left = sorted(weights.files.keys() - set(named.keys.values()))
        return WeightOrigin(StoredModel(architecture.build, named), True, (f"weights: {source}", *_unused(left)))
    return _converted_origin(architecture, source, named)


def _refuse_other_formats(architecture: Architecture) -> None:
    """Raise WorkloadError if a folder without readable weights has files that look like weights."""
    folder = architecture.folder
    found = next((path for pattern in _OTHER_FORMATS for path in sorted(folder.glob(pattern))), None)
    if found is None:
        return
    if found.suffix == ".safetensors":
        raise WorkloadError(
            f"{found}: weights are read from {SINGLE} (or several files with an index): rename it, or set "
            "weights=random to train from random weights"
        )
    pickled = "" if found.suffix in (".h5", ".msgpack", ".gguf") else "is pickled, and "
    raise WorkloadError(
        f'{found} {pickled}cannot be read: only safetensors files are; convert it with python -c "from transformers '
        f"import {architecture.name} as M; M.from_pretrained('{folder}').save_pretrained('{folder}')\", or set "
        "weights=random to train from random weights"
    )


def _converted_origin(architecture: Architecture, source: str, example: str) -> WeightOrigin:
    """Return the factory of a model that transformers reads as a whole. Builds it once to see which weights it lacks.

    `example` is a parameter that the files do not have under its name.
    """
    model, lacking, left = _read_whole(architecture)
    prefix = getattr(model, "base_model_prefix", "")
    inside = [name for name in lacking if prefix and name.startswith(f"{prefix}.")]
    if inside or len(lacking) == len(model.state_dict()):
        raise WorkloadError(
            f"{source} lacks {(inside or lacking)[0]} of {architecture.name}: give the weights of this architecture, "
            "or set weights=random to train from random weights"
        )
    how = f"{example} is not stored under its name, so every worker reads all weights, as transformers converts them"
    if lacking:
        how = f"new in {architecture.name}, so random at first: {', '.join(lacking)}; every worker reads all weights"
    return WeightOrigin(partial(_converted, architecture), True, (f"weights: {source}", how, *_unused(left)))


def _unused(left: list[str]) -> tuple[str, ...]:
    """Return a note on tensors in the files that the model does not have."""
    if not left:
        return ()
    others = f" and {len(left) - 1} others" if len(left) > 1 else ""
    return (f"weights: {left[0]}{others} in the files are not part of this architecture: neither trained nor exported",)


def _converted(architecture: Architecture) -> nn.Module:
    """Build the model with weights that transformers renames, joins or initialises."""
    return _read_whole(architecture)[0]


def _read_whole(architecture: Architecture) -> tuple[nn.Module, list[str], list[str]]:
    """Return the model, its tensors that the files lack, and tensors of the files that it lacks.

    Raises:
        WorkloadError: a tensor has another shape than in the model, or transformers cannot read the files.
    """
    transformers = require("transformers", "transformers", "huggingface")
    try:
        model, found = getattr(transformers, architecture.name).from_pretrained(
            architecture.folder,
            config=architecture.config,
            local_files_only=True,
            use_safetensors=True,  # other formats are pickled
            trust_remote_code=False,
            dtype="float32",
            output_loading_info=True,
        )
    except RuntimeError as error:
        text = " ".join(str(error).split())[:300]
        raise WorkloadError(f"the weights in {str(architecture.folder)!r} cannot be read: {text}") from error
    _check_shapes(architecture, found)
    return model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"])


def _check_shapes(architecture: Architecture, found: Any) -> None:
    for name, stored, wanted in found.get("mismatched_keys", ()):
        raise WorkloadError(
            f"{name} is stored with shape {tuple(stored)} in {architecture.folder}, the model has {tuple(wanted)}"
        )
