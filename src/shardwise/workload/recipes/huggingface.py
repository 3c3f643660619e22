"""A folder with a Hugging Face `config.json` as a workload: its own architecture, from its weights if it has them.

The architecture that the configuration names decides the training task:

    causal language model     predict the next token
    encoder and decoder       predict the tokens that follow a text
    masked language model     predict every seventh token, which is hidden
    image classification      classify scikit-learn's digits

Text is Python's standard library, or the user's `data`; in tokens of the folder's `tokenizer.json`, else byte by byte.
Weights in safetensors files are not read as a whole: each worker reads the part that it holds.

The parameters, for --set:
    batch_size: samples per step over all workers.
    sequence: tokens per sample.
    precision: float32 or bf16.
    data: text or token ids as in the recipe `language`; None means the standard library's source.
    learning_rate: constant learning rate.
    weight_decay: AdamW's weight decay of matrices and kernels.
    clip_norm: largest norm of the gradient; None means no clipping.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from shardwise.errors import DataError, WorkloadError
from shardwise.files import check_regular
from shardwise.workload.recipes.checks import check_positive
from shardwise.workload.recipes.datasets.cache import Array, LazyArray, cached, fingerprint
from shardwise.workload.recipes.datasets.images import digits
from shardwise.workload.recipes.datasets.text import Corpus, Span, Windows, standard_library, user_corpus
from shardwise.workload.recipes.packages import require
from shardwise.workload.recipes.training import adamw
from shardwise.workload.trace.graph import first_line
from shardwise.workload.weight_files import SINGLE, StoredModel, StoredWeights
from shardwise.workload.workload import Workload

CONFIG, TOKENIZER, ADAPTER = "config.json", "tokenizer.json", "adapter_config.json"

LARGEST_CONFIG, LARGEST_TOKENIZER = 16 << 20, 256 << 20
"""Largest sizes of these files in bytes."""

HIDDEN_EVERY = 7
"""Interval of the tokens that are hidden from a masked language model: about the 15% of BERT (Devlin et al. 2018)."""

TOKENIZED_BYTES = 8_000_000
"""Most bytes of text that are tokenized: more would take minutes."""

_KINDS = {
    "causal": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "translation": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "masked": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "image": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
}


def huggingface_workload(folder: Path) -> Callable[..., Workload]:
    """Return the workload function of a folder."""

    def workload(
        batch_size: int = 8,
        sequence: int = 128,
        precision: Literal["float32", "bf16"] = "float32",
        data: str | None = None,
        learning_rate: float = 3e-4,
        weight_decay: float = 0.1,
        clip_norm: float | None = 1.0,
    ) -> Workload:
        check_positive(batch_size=batch_size, sequence=sequence, learning_rate=learning_rate)
        architecture = _architecture(folder)
        architecture.check_sequence(sequence)
        task = _task(architecture, folder, sequence, data)
        return Workload(
            name=folder.resolve().name,
            model=_factory(architecture, folder),
            dataset=task.dataset,
            inputs=task.inputs,
            loss=task.loss,
            optimizer=adamw(learning_rate, weight_decay),
            batch_size=batch_size,
            precision=precision,
            clip_norm=clip_norm,
        )

    return workload


_COMPUTED_POSITIONS = ("rope_theta", "rope_parameters", "rope_scaling", "rotary_dim", "rotary_pct", "alibi")
"""Configuration fields of models that compute their positions, for sequences of any length."""


@dataclass(frozen=True)
class _Architecture:
    """A class of transformers with its kind of task, its configuration and the folder of the configuration."""

    kind: str
    name: str
    config: Any
    folder: Path

    def build(self) -> nn.Module:
        """Build the model. Raises WorkloadError if the class cannot be built from the configuration."""
        made = getattr(require("transformers", "transformers", "huggingface"), self.name)
        try:
            model: nn.Module = made(self.config)
        except (
            ArithmeticError,
            AssertionError,
            AttributeError,
            LookupError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            if isinstance(error, torch.OutOfMemoryError):
                raise
            raise WorkloadError(
                f"{self.folder / CONFIG}: {self.name} cannot be built of it: {first_line(error)}; correct its sizes"
            ) from error
        return model

    def check_sequence(self, sequence: int) -> None:
        """Raise WorkloadError if the model has a table of positions that is shorter than the samples."""
        config = _text_config(self.config)
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


@dataclass(frozen=True)
class _Task:
    """Training task of a model: its data, inputs and loss."""

    dataset: Any
    inputs: Callable[[Any], Any]
    loss: Callable[[Any, Any], Tensor]


def _architecture(folder: Path) -> _Architecture:
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    check_regular(folder / CONFIG, WorkloadError, limit_bytes=LARGEST_CONFIG)
    transformers = require("transformers", "transformers", "huggingface")
    auto = require("transformers.models.auto.modeling_auto", "transformers", "huggingface")
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
    named = (config.architectures or [""])[0]
    for kind, mapping in _KINDS.items():
        names = getattr(auto, mapping)
        if named and any(named == name or named in name for name in _texts(names.values())):
            return _Architecture(kind, named, config, folder)
    # a bare model, or no architecture named: use the first head that transformers has for this type of model
    kinds = (["translation"] if getattr(config, "is_encoder_decoder", False) else []) + ["masked", "causal", "image"]
    for kind in kinds:
        mapping = _KINDS[kind]
        name = next(iter(_texts([getattr(auto, mapping).get(config.model_type, ())])), None)
        if name is not None:
            return _Architecture(kind, name, config, folder)
    raise WorkloadError(
        f"{folder / CONFIG}: {named or config.model_type} is neither a causal, masked or encoder-decoder language "
        "model nor an image classifier: write a workload function for it (file.py:function)"
    )


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


def _factory(architecture: _Architecture, folder: Path) -> Callable[[], nn.Module]:
    weights = StoredWeights.of_folder(folder)
    if weights is None:
        return architecture.build
    model = StoredModel(architecture.build, weights)()
    named = weights.named_for(model, getattr(model, "base_model_prefix", ""))
    if isinstance(named, StoredWeights):
        return StoredModel(architecture.build, named)
    warnings.warn(
        f"{folder}: {named} is not stored under its name, so every worker reads all weights, as transformers converts "
        "them",
        stacklevel=2,
    )
    return partial(_converted, architecture, folder)


def _converted(architecture: _Architecture, folder: Path) -> nn.Module:
    """Build the model with weights that transformers has to rename or join."""
    transformers = require("transformers", "transformers", "huggingface")
    model: nn.Module = getattr(transformers, architecture.name).from_pretrained(
        folder,
        config=architecture.config,
        local_files_only=True,
        use_safetensors=True,  # other formats are pickled
        trust_remote_code=False,
        dtype="float32",
    )
    return model


# ---- training tasks -------------------------------------------------------------------------------------------------


def _task(architecture: _Architecture, folder: Path, sequence: int, data: str | None) -> _Task:
    if architecture.kind == "image":
        return _images(architecture.config)
    vocabulary = _text_config(architecture.config).vocab_size
    corpus = _corpus(folder, data, vocabulary)
    if architecture.kind == "causal":
        return _Task(
            Windows(corpus.train, sequence),
            lambda batch: {"input_ids": batch["tokens"][:, :-1]},
            lambda output, batch: _cross_entropy(output.logits, batch["tokens"][:, 1:]),
        )
    if architecture.kind == "translation":
        return _Task(
            Windows(corpus.train, 2 * sequence),
            lambda batch: {
                "input_ids": batch["tokens"][:, :sequence],
                "decoder_input_ids": batch["tokens"][:, sequence:-1],
            },
            lambda output, batch: _cross_entropy(output.logits, batch["tokens"][:, sequence + 1 :]),
        )
    hidden = slice(HIDDEN_EVERY // 2, sequence, HIDDEN_EVERY)
    if sequence <= HIDDEN_EVERY // 2:
        raise WorkloadError(f"sequence={sequence}: a masked language model needs {HIDDEN_EVERY} tokens or more")

    def masked(batch: Any) -> dict[str, Tensor]:
        tokens = batch["tokens"][:, :sequence].clone()
        tokens[:, hidden] = vocabulary - 1
        return {"input_ids": tokens}

    return _Task(
        Windows(corpus.train, sequence),
        masked,
        lambda output, batch: _cross_entropy(output.logits[:, hidden], batch["tokens"][:, :sequence][:, hidden]),
    )


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (samples, tokens, vocabulary) in nats per token."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten())


def _images(config: Any) -> _Task:
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    if config.num_labels < 10:
        raise WorkloadError(f"num_labels={config.num_labels}: the digits have 10 classes")
    channels = config.num_channels
    return _Task(
        digits(size).train,
        lambda batch: {"pixel_values": batch["image"].expand(-1, channels, -1, -1)},
        lambda output, batch: F.cross_entropy(output.logits, batch["label"]),
    )


def _text_config(config: Any) -> Any:
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _corpus(folder: Path, data: str | None, vocabulary: int) -> Corpus:
    corpus = standard_library() if data is None else user_corpus(data, "uint16", None)
    if corpus.unit == "byte" and (folder / TOKENIZER).exists():
        tokenizer = folder / TOKENIZER
        check_regular(tokenizer, DataError, limit_bytes=LARGEST_TOKENIZER)
        corpus = Corpus(
            _tokenized(corpus.train, tokenizer), _tokenized(corpus.held_out, tokenizer), vocabulary, "token"
        )
    elif corpus.vocabulary > vocabulary:
        raise DataError(
            f"vocab_size={vocabulary} of {folder / CONFIG}: the data has {corpus.vocabulary} different {corpus.unit}s; "
            f"use a larger vocab_size, or put the model's {TOKENIZER} into the folder"
        )
    return corpus


def _tokenized(span: Span, tokenizer: Path) -> Span:
    part = Span(span.tokens, span.first, min(span.last, span.first + TOKENIZED_BYTES))
    key = [fingerprint([tokenizer]), part.first, part.last, _checksum(part)]
    lazy = LazyArray(partial(cached, "tokenized", key, partial(_tokens, part, tokenizer)))
    return Span(lazy, 0, len(lazy.array))


def _checksum(span: Span) -> int:
    import zlib

    return zlib.crc32(span.tokens.array[span.first : span.last].tobytes())


def _tokens(span: Span, tokenizer: Path) -> Array:
    text = span.tokens.array[span.first : span.last].tobytes().decode(errors="replace")
    encoder = require("tokenizers", "tokenizers", "huggingface").Tokenizer.from_file(str(tokenizer))
    lines = text.splitlines(keepends=True)
    pieces = ["".join(lines[start : start + 1000]) for start in range(0, len(lines), 1000)]
    ids = [np.array(each.ids, dtype=np.uint32) for each in encoder.encode_batch(pieces, add_special_tokens=False)]
    return np.concatenate(ids) if ids else np.zeros(0, dtype=np.uint32)
