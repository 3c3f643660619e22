"""A GPT given by its sizes, `gpt:layers=96,hidden=12288,heads=96`: to predict models that are too large, or to train.

The model is that of the recipe `language`: pre-norm blocks with RMS norm, rotary attention and SwiGLU. It trains on the
bytes of the standard library's source, whatever the size of its vocabulary.

The parameters, after `gpt:` or for --set:
    layers: transformer blocks.
    hidden: features per token.
    heads: attention heads.
    kv_heads: heads of keys and values; None means as many as `heads`.
    ffn: width of the perceptrons, which have three matrices. None means 8/3 of `hidden`, which gives as many parameters
        as the classic two matrices of width 4 `hidden`.
    vocabulary: number of tokens, 256 or more.
    sequence: tokens per sample.
    tied: whether the output layer shares the weight of the token embedding.
    batch_size: samples per step over all workers.
    precision: float32, bf16 or autocast.
    learning_rate: constant learning rate.
    weight_decay: AdamW's weight decay of matrices.
    clip_norm: largest norm of the gradient; None means no clipping.
"""

from __future__ import annotations

from typing import Literal

from shardwise.errors import WorkloadError
from shardwise.workload.recipes.checks import DEEPEST, MOST, check_at_most, check_divides, check_positive
from shardwise.workload.recipes.datasets.text import Windows, standard_library
from shardwise.workload.recipes.language import next_token_loss
from shardwise.workload.recipes.models.gpt import GPT
from shardwise.workload.recipes.training import adamw
from shardwise.workload.workload import Workload

BYTES = 256
"""Number of different tokens in the default data."""


def gpt(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int | None = None,
    ffn: int | None = None,
    vocabulary: int = 50304,
    sequence: int = 2048,
    tied: bool = False,
    batch_size: int = 8,
    precision: Literal["float32", "bf16", "autocast"] = "bf16",
    learning_rate: float = 3e-4,
    weight_decay: float = 0.1,
    clip_norm: float | None = 1.0,
) -> Workload:
    """Build a GPT of these sizes that is trained to predict the next token."""
    check_positive(layers=layers, heads=heads, sequence=sequence, learning_rate=learning_rate, batch_size=batch_size)
    check_at_most(DEEPEST, layers=layers, heads=heads)
    check_at_most(MOST, vocabulary=vocabulary)
    check_divides("hidden", hidden, 2 * heads, f"2 x heads={heads}, for rotary attention turns pairs of features")
    if kv_heads is not None and (kv_heads < 1 or heads % kv_heads):
        fitting = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise WorkloadError(f"kv_heads={kv_heads}: must divide heads={heads}; use one of {fitting}")
    if ffn is not None:
        check_positive(ffn=ffn)
    if vocabulary < BYTES:
        raise WorkloadError(f"vocabulary={vocabulary}: the data has {BYTES} different tokens; use {BYTES} or more")
    return Workload(
        name="gpt",
        model=lambda: GPT(
            vocabulary=vocabulary,
            sequence=sequence,
            layers=layers,
            hidden=hidden,
            heads=heads,
            kv_heads=kv_heads,
            inner=ffn,
            tied=tied,
        ),
        dataset=Windows(standard_library().train, sequence),
        inputs=lambda batch: batch["tokens"][:, :-1],
        loss=next_token_loss,
        optimizer=adamw(learning_rate, weight_decay, betas=(0.9, 0.95)),
        batch_size=batch_size,
        clip_norm=clip_norm,
        precision=precision,
    )
