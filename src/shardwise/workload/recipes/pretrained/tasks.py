"""The training task of each kind of architecture: its data, its inputs, its loss and what is measured on held-out data.

causal         predict the next token
translation    predict the tokens that follow a text
masked         predict the 15% of the tokens that are hidden, others in each epoch
labelled       classify the user's labelled text
image          classify scikit-learn's digits
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import Subset

from shardwise.errors import DataError, WorkloadError
from shardwise.workload.recipes.datasets.images import digits
from shardwise.workload.recipes.datasets.text import Corpus, Windows
from shardwise.workload.recipes.pretrained.architecture import CONFIG, Architecture, text_config
from shardwise.workload.recipes.pretrained.labelled import Classified, labelled_text
from shardwise.workload.recipes.pretrained.masked import IGNORED, HiddenTokens, hidden_tokens
from shardwise.workload.recipes.pretrained.tokens import corpus_of, mask_token, tokenizer_path
from shardwise.workload.workload import Evaluation


@dataclass(frozen=True)
class Task:
    """Data, inputs and loss of a training task; the fields have the meaning of those of `Workload`."""

    dataset: Any
    inputs: Callable[[Any], Any]
    loss: Callable[[Any, Any], Tensor]
    weight: Callable[[Any], Any] | None = None
    evaluation: Evaluation | None = None
    notes: tuple[str, ...] = ()


def task_of(architecture: Architecture, sequence: int, data: str | None, held_out: int) -> Task:
    """Return the task of an architecture.

    Args:
        architecture: model to train.
        sequence: tokens per sample.
        data: the user's data.
        held_out: largest number of held-out samples to measure; 0 for none.

    Raises:
        DataError: the data cannot be read, or do not fit the model.
        WorkloadError: the sequence is too short.
    """
    if architecture.kind == "image":
        return _images(architecture.config, held_out)
    if architecture.kind == "labelled":
        return _labelled(architecture, sequence, data, held_out)
    makers = {"causal": _causal, "translation": _translation, "masked": _masked}
    corpus = corpus_of(architecture, data)
    task = makers[architecture.kind](architecture, corpus, sequence, held_out)
    return replace(task, notes=(*task.notes, *_bytes_note(architecture, corpus.unit == "byte")))


def _bytes_note(architecture: Architecture, by_bytes: bool) -> tuple[str, ...]:
    if not by_bytes or tokenizer_path(architecture.folder) is not None:
        return ()
    return (f"text: byte by byte, because {architecture.folder} holds no tokenizer.json",)


def _causal(architecture: Architecture, corpus: Corpus, sequence: int, held_out: int) -> Task:
    def loss(output: Any, batch: Any) -> Tensor:
        return _cross_entropy(output.logits, batch["tokens"][:, 1:])

    return Task(
        Windows(corpus.train, sequence),
        lambda batch: {"input_ids": batch["tokens"][:, :-1]},
        loss,
        evaluation=_in_bits(_held_out(corpus, sequence, held_out), corpus.unit, loss),
    )


def _translation(architecture: Architecture, corpus: Corpus, sequence: int, held_out: int) -> Task:
    def loss(output: Any, batch: Any) -> Tensor:
        return _cross_entropy(output.logits, batch["tokens"][:, sequence + 1 :])

    return Task(
        Windows(corpus.train, 2 * sequence),
        lambda batch: {
            "input_ids": batch["tokens"][:, :sequence],
            "decoder_input_ids": batch["tokens"][:, sequence:-1],
        },
        loss,
        evaluation=_in_bits(_held_out(corpus, 2 * sequence, held_out), corpus.unit, loss),
    )


def _masked(architecture: Architecture, corpus: Corpus, sequence: int, held_out: int) -> Task:
    mask, vocabulary = mask_token(architecture), architecture.vocabulary

    def loss(output: Any, batch: Any) -> Tensor:
        return _cross_entropy(output.logits, batch["targets"])

    kept = _held_out(corpus, sequence, held_out)
    return Task(
        HiddenTokens(Windows(corpus.train, sequence), mask, vocabulary),
        lambda batch: {"input_ids": batch["tokens"]},
        loss,
        weight=hidden_tokens,
        evaluation=_in_bits(kept and HiddenTokens(kept, mask, vocabulary), corpus.unit, loss),
    )


def _held_out(corpus: Corpus, sequence: int, count: int) -> Windows | None:
    """Return held-out windows. Returns None if none are wanted, or the held-out text is shorter than one."""
    enough = corpus.held_out.last - corpus.held_out.first > sequence
    return Windows(corpus.held_out, sequence, count) if count and enough else None


def _in_bits(dataset: Any, unit: str, loss: Callable[[Any, Any], Tensor]) -> Evaluation | None:
    if dataset is None:
        return None
    return Evaluation(
        dataset=dataset,
        metric=f"bits_per_{unit}",
        measure=lambda output, batch: loss(output, batch) / math.log(2),
        higher_is_better=False,
    )


def _cross_entropy(logits: Tensor, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of logits (samples, tokens, vocabulary) in nats per predicted token."""
    return F.cross_entropy(logits.flatten(0, 1), tokens.flatten(), ignore_index=IGNORED)


def _labelled(architecture: Architecture, sequence: int, data: str | None, held_out: int) -> Task:
    config = architecture.config
    kind = config.problem_type
    if config.num_labels < 2 or kind not in (None, "single_label_classification"):
        raise WorkloadError(
            f"{architecture.folder / CONFIG}: {architecture.name} with num_labels={config.num_labels} and problem_type="
            f"{kind} is no classifier into two or more classes: write a workload function for it (file.py:function)"
        )
    pad = text_config(config).pad_token_id
    if pad is None:
        raise WorkloadError(
            f"{architecture.folder / CONFIG}: pad_token_id is missing, by which {architecture.name} finds the end of a "
            "text: set it to the tokenizer's padding token"
        )
    text = labelled_text(architecture, data)
    if tokenizer_path(architecture.folder) is None and architecture.vocabulary < 256:
        raise DataError(f"vocab_size={architecture.vocabulary}: text is read byte by byte and needs 256")

    def samples(rows: list[tuple[str, str]]) -> Classified:
        return Classified(rows, text.numbers, architecture.folder, pad, sequence)

    return Task(
        samples(text.train),
        lambda batch: {"input_ids": batch["tokens"], "attention_mask": batch["attention"]},
        _class_loss,
        evaluation=_accuracy(samples(text.held_out[:held_out])) if text.held_out[:held_out] else None,
        notes=_bytes_note(architecture, True),
    )


def _images(config: Any, held_out: int) -> Task:
    size = config.image_size if isinstance(config.image_size, int) else config.image_size[0]
    if config.num_labels < 10:
        raise WorkloadError(f"num_labels={config.num_labels}: the digits have 10 classes")
    channels, images = config.num_channels, digits(size)
    kept = Subset(images.held_out, range(min(held_out, len(images.held_out))))
    return Task(
        images.train,
        lambda batch: {"pixel_values": batch["image"].expand(-1, channels, -1, -1)},
        _class_loss,
        evaluation=_accuracy(kept) if held_out else None,
    )


def _class_loss(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output.logits, batch["label"])


def _accuracy(dataset: Any) -> Evaluation:
    return Evaluation(
        dataset=dataset,
        metric="accuracy",
        measure=lambda output, batch: (output.logits.argmax(-1) == batch["label"]).float().mean(),
    )
