"""Peak memory of the rank that needs most, from sizes.

parameters, gradients, optimizer    bytes per parameter by precision, divided by what shards them (Rajbhandari 2020)
activations                         per block and microbatch: s b h (34 + 5 a s / h) and its parts (Korthikanti 2022)
temporary                           logits, gathered parameters of one block
"""

from __future__ import annotations

from math import ceil

from shardwise.predict.prediction import Memory
from shardwise.predict.transformer.sizes import Setup, Sizes

MOMENTS = 8
"""Bytes per parameter of Adam's two moments, which are float32."""


def memory(sizes: Sizes, setup: Setup) -> Memory:
    """Peak memory of one rank of the first stage, in bytes; tensors that are allocated, not what is reserved."""
    held = _held_parameters(sizes, setup)
    width = 4 if setup.dtype == "float32" else 2
    shards = setup.shards if setup.zero == 3 else setup.replicas
    if setup.zero == 3:  # FSDP keeps float32 shards and casts what it gathers
        weights, master, gradients = 4.0 / shards, 0.0, 4.0 / shards
    else:
        weights, master = float(width), 0.0 if width == 4 else 4.0
        gradients = setup.stack.accumulation_bytes / (setup.replicas if setup.zero == 2 else 1)
    states = (master + MOMENTS) / (shards if setup.zero else 1)
    return Memory(
        parameters=round(held * weights),
        gradients=round(held * gradients),
        optimizer=round(held * states),
        activations=round(_activations(sizes, setup, width)),
        temporary=round(_temporary(sizes, setup, width)),
    )


def _held_parameters(sizes: Sizes, setup: Setup) -> float:
    layers = ceil(sizes.layers / setup.pipeline)
    held = layers * sizes.layer_parameters + sizes.embedding_parameters
    if setup.pipeline == 1:
        held += sizes.head_parameters
    return held / setup.tensor


def _activations(sizes: Sizes, setup: Setup, width: int) -> float:
    """Of all microbatches that are under way in the first stage: `pipeline` of them under 1F1B, more if interleaved."""
    layers = ceil(sizes.layers / setup.pipeline)
    under_way = float(min(setup.pipeline, setup.microbatches) if setup.schedule == "1f1b" else setup.microbatches)
    if setup.chunks > 1:
        under_way *= 1 + (setup.pipeline - 1) / (setup.pipeline * setup.chunks)
    tokens = setup.micro_batch * sizes.sequence / setup.context
    whole = _block_bytes(sizes, setup, width)
    spread = setup.tensor if setup.sequence_parallel else 1
    entry = width * tokens * sizes.hidden / spread
    if setup.recompute == "full":
        return under_way * layers * entry + whole
    if setup.recompute == "layers":
        return under_way * layers * (entry + whole) / 2
    return under_way * layers * whole


def _block_bytes(sizes: Sizes, setup: Setup, width: int) -> float:
    """What one block keeps of one microbatch for its backward pass."""
    tokens = setup.micro_batch * sizes.sequence / setup.context
    masks = 1 if setup.stack.dropout else 0
    spread = setup.tensor if setup.sequence_parallel else 1
    common = tokens * sizes.hidden * (4 * width + 2 * masks) / spread  # inputs of norms and of products, masks
    inner = tokens * width * (sizes.qkv + sizes.hidden) / setup.tensor
    inner += tokens * width * sizes.ffn * (3 if sizes.gated else 2) / setup.tensor
    scores = 0.0
    if setup.stack.attention in ("unfused", "eager") and setup.recompute == "none":
        scores = tokens * sizes.heads * sizes.sequence * (2 * width + masks) / setup.tensor
    return common + inner + scores


def _temporary(sizes: Sizes, setup: Setup, width: int) -> float:
    """Logits and their gradient where the first stage is the last one too; a gathered block and its gradient."""
    tokens = setup.micro_batch * sizes.sequence / setup.context
    logits = tokens * sizes.vocab / setup.tensor * (width + 4) if setup.pipeline == 1 else 0.0
    gathered = 2 * width * sizes.layer_parameters / setup.tensor if setup.zero == 3 else 0.0
    return max(logits, gathered)
