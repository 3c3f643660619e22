"""The architecture that the `config.json` of a Hugging Face folder names, and the kind of its training task."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from shardwise.errors import WorkloadError
from shardwise.files import check_regular
from shardwise.workload.recipes.packages import require
from shardwise.workload.trace.graph import first_line
from shardwise.workload.weight_files import SINGLE

CONFIG, ADAPTER = "config.json", "adapter_config.json"

LARGEST_CONFIG = 16 << 20
"""Largest size of a configuration in bytes."""

_KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "translation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "labelled": "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}

_COMPUTED_POSITIONS = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "alibi")
"""Configuration fields of models that compute their positions, for sequences of any length."""

_UNBUILDABLE = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError)
"""Errors that models raise if they are built with inconsistent sizes."""


@dataclass(frozen=True)
class Architecture:
    """A class of transformers with its kind of task, its configuration and the folder of the configuration.

    Attributes:
        kind: `causal`, `translation`, `masked`, `labelled` or `image`.
        name: name of the class.
        config: configuration, as transformers reads it.
        folder: folder of the configuration.
        bare: whether the configuration names no class with a head, so that the head is this program's choice.
    """

    kind: str
    name: str
    config: Any
    folder: Path
    bare: bool = False

    @property
    def vocabulary(self) -> int:
        """Return the number of tokens."""
        size: int = text_config(self.config).vocab_size
        return size

    @property
    def in_bf16(self) -> bool:
        """Return whether the configuration says that the model computes in bfloat16."""
        return self.dtype == "bfloat16"

    @property
    def dtype(self) -> str:
        """Return the dtype that the configuration, or its part for the language model, names; empty if neither does."""
        named = getattr(self.config, "dtype", None) or getattr(text_config(self.config), "dtype", None) or ""
        return str(named).removeprefix("torch.")

    def build(self) -> nn.Module:
        """Build the model. Raises WorkloadError if the class cannot be built from the configuration."""
        made = getattr(require("transformers", "transformers", "huggingface"), self.name)
        try:
            model: nn.Module = made(self.config)
        except _UNBUILDABLE as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise WorkloadError(
                f"{self.folder / CONFIG}: {self.name} cannot be built of it: {first_line(error)}; correct its sizes"
            ) from error
        return model

    def check_sequence(self, sequence: int) -> None:
        """Raise WorkloadError if the model has a table of positions that is shorter than the samples."""
        config = text_config(self.config)
        positions = getattr(config, "max_position_embeddings", None)
        computed = any(getattr(config, name, None) for name in _COMPUTED_POSITIONS)
        if self.kind == "image" or computed or not isinstance(positions, int):
            return
        if "roberta" in config.model_type or config.model_type == "camembert":  # positions start behind the padding
            positions -= config.pad_token_id + 1
        if sequence > positions:
            raise WorkloadError(
                f"sequence={sequence}: {self.name} has {positions} positions (max_position_embeddings in "
                f"{self.folder / CONFIG}): use sequence={positions} or less"
            )


def architecture_of(folder: Path) -> Architecture:
    """Read which class the configuration of a folder names.

    Raises:
        WorkloadError: the configuration cannot be read, or it names a class that has no training task here.
    """
    config = _config(folder)
    auto = require("transformers.models.auto.modeling_auto", "transformers", "huggingface")
    named = (config.architectures or [""])[0]
    for kind, mapping in _KINDS.items():
        if named and named in _texts(getattr(auto, mapping).values()):
            return Architecture(kind, named, config, folder)
    if named and named not in _texts(auto.MODEL_MAPPING_NAMES.values()):
        raise _unsupported(folder, named)
    # a bare model, or no architecture named: use the first head that transformers has for this type of model
    kinds = (["translation"] if getattr(config, "is_encoder_decoder", False) else []) + ["masked", "causal", "image"]
    for kind in kinds:
        mapping = _KINDS[kind]
        name = next(iter(_texts([getattr(auto, mapping).get(config.model_type, ())])), None)
        if name is not None:
            return Architecture(kind, name, config, folder, bare=True)
    raise _unsupported(folder, named or config.model_type)


def _unsupported(folder: Path, name: str) -> WorkloadError:
    return WorkloadError(
        f"{folder / CONFIG}: {name} is neither a causal, masked or encoder-decoder language model nor a classifier of "
        "text or images: write a workload function for it, with your own data (file.py:function)"
    )


def _config(folder: Path) -> Any:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    check_regular(folder / CONFIG, WorkloadError, limit_bytes=LARGEST_CONFIG)
    transformers = require("transformers", "transformers", "huggingface")
    try:
        config = transformers.AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        if "trust_remote_code" in str(error):
            raise WorkloadError(
                f"{folder / CONFIG} names code of its own (auto_map), which is not run: write a workload function for "
                "the model (file.py:function)"
            ) from error
        raise WorkloadError(f"{folder / CONFIG} cannot be read: {' '.join(str(error).split())[:300]}") from error
    if getattr(config, "quantization_config", None) is not None:
        raise WorkloadError(f"{folder / CONFIG}: the weights are quantized; training needs a folder with plain ones")
    _refuse_code(config, folder)
    if getattr(config, "use_cache", False):
        config.use_cache = False  # the key-value cache is only useful for generation
    return config


def _refuse_code(config: Any, folder: Path) -> None:
    """Raise WorkloadError if the configuration names code to fetch or other weights, or the folder has an adapter."""
    for each in _nested(config):
        attention = getattr(each, "_attn_implementation", None)
        if attention is not None and not str(attention).isidentifier():
            raise WorkloadError(
                f"{folder / CONFIG}: attn_implementation={attention!r} is code from elsewhere, which is not run: "
                "remove it, or write eager or sdpa"
            )
        if getattr(each, "transformers_weights", None) is not None:
            raise WorkloadError(f"{folder / CONFIG}: transformers_weights is not followed: name the file {SINGLE}")
    if (folder / ADAPTER).exists():
        raise WorkloadError(f"{folder} holds an adapter ({ADAPTER}): merge it into the model's weights")


def _nested(config: Any) -> list[Any]:
    """Return a configuration and those of its parts, for example an image encoder."""
    parts = [getattr(config, name, None) for name in getattr(config, "sub_configs", {})]
    return [config, *(each for part in parts if part is not None for each in _nested(part))]


def _texts(names: Any) -> list[str]:
    return [text for each in names for text in ([each] if isinstance(each, str) else each)]


def text_config(config: Any) -> Any:
    """Return the part of a configuration that describes the language model."""
    return config.get_text_config() if hasattr(config, "get_text_config") else config
