"""Language modelling: a GPT with rotary attention on the standard library's source, or the user's own text.

The parameters, for --set:
    data: text files (a file, a folder, a pattern such as `texts/*.txt`), token ids (`file.bin`, `file.npy`, or a
        folder with `train.bin` and `val.bin`); None means the source of Python's standard library.
    token_dtype: dtype of the ids in a `.bin` file.
    vocabulary: number of tokens; None means 256 for text, and for token ids the number needed, rounded up to 64.
    sequence: tokens per sample.
    layers: transformer blocks.
    hidden: features per token.
    heads: attention heads.
    dropout: share of activations dropped in training.
    tied: whether the output layer shares the weight of the token embedding.
    batch_size: samples per step over all workers.
    learning_rate: largest learning rate, reached after the warm-up.
    weight_decay: AdamW's weight decay of matrices.
    schedule_steps: steps over which the learning rate rises and falls, and the default length of a training.
    clip_norm: largest norm of the gradient; None means no clipping.
    evaluation_samples: number of held-out windows that are scored.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch.nn.functional as F
from torch import Tensor

from shardwise.workload.recipes.checks import DEEPEST, MOST, check_at_most, check_divides, check_positive, check_share
from shardwise.workload.recipes.datasets.text import Windows, standard_library, user_corpus
from shardwise.workload.recipes.models.gpt import GPT
from shardwise.workload.recipes.training import adamw, epochs_of, warmup_cosine
from shardwise.workload.workload import Evaluation, Workload


def language(
    data: str | None = None,
    token_dtype: Literal["uint8", "uint16", "uint32"] = "uint16",
    vocabulary: int | None = None,
    sequence: int = 128,
    layers: int = 4,
    hidden: int = 128,
    heads: int = 4,
    dropout: float = 0.0,
    tied: bool = False,
    batch_size: int = 16,
    learning_rate: float = 3e-3,
    weight_decay: float = 0.1,
    schedule_steps: int = 500,
    clip_norm: float | None = 1.0,
    evaluation_samples: int = 256,
) -> Workload:
    """Build a GPT that predicts the next byte (or token), scored in bits per byte (or token) on held-out text."""
    check_positive(sequence=sequence, layers=layers, heads=heads, schedule_steps=schedule_steps)
    check_positive(learning_rate=learning_rate, evaluation_samples=evaluation_samples, batch_size=batch_size)
    check_at_most(DEEPEST, layers=layers, heads=heads)
    check_at_most(MOST, vocabulary=vocabulary or 0)
    check_share(dropout=dropout)
    check_divides("hidden", hidden, 2 * heads, f"2 x heads={heads}, for rotary attention turns pairs of features")
    corpus = standard_library() if data is None else user_corpus(data, token_dtype, vocabulary)
    tokens = corpus.vocabulary
    windows = Windows(corpus.train, sequence)
    return Workload(
        name="language",
        model=lambda: GPT(
            vocabulary=tokens,
            sequence=sequence,
            layers=layers,
            hidden=hidden,
            heads=heads,
            dropout=dropout,
            tied=tied,
        ),
        dataset=windows,
        inputs=lambda batch: batch["tokens"][:, :-1],
        loss=next_token_loss,
        optimizer=adamw(learning_rate, weight_decay, betas=(0.9, 0.95)),
        batch_size=batch_size,
        schedule=warmup_cosine(schedule_steps),
        evaluation=Evaluation(
            dataset=Windows(corpus.held_out, sequence, evaluation_samples),
            metric=f"bits_per_{corpus.unit}",
            measure=lambda output, batch: next_token_loss(output, batch) / math.log(2),
            higher_is_better=False,
        ),
        clip_norm=clip_norm,
        epochs=epochs_of(schedule_steps, windows, batch_size),
    )


def next_token_loss(output: Tensor, batch: Any) -> Tensor:
    """Return the mean cross entropy of the next token in nats; all samples have equally many tokens."""
    return F.cross_entropy(output.flatten(0, 1), batch["tokens"][:, 1:].flatten())
