"""Peak memory of the rank that needs most, from sizes: tensors that are allocated, not what an allocator reserves.

parameters, gradients, optimizer    bytes per parameter by precision, divided by what shards them (Rajbhandari 2020)
activations                         of the microbatches under way in a stage (`activations.py`, `stages.py`)
temporary                           the loss, or a block's backward pass; what FSDP gathers; workspaces of libraries
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from shardwise.predict.prediction import Memory
from shardwise.predict.published.predictor import activations
from shardwise.predict.published.predictor.sizes import Setup, Sizes
from shardwise.predict.published.predictor.stages import layers_of_stages, parameters_of_stages, under_way

MOMENTS = 8
"""Bytes per parameter of Adam's two moments, which are float32."""

MASTER = 4
"""Bytes per parameter of the copy in float32 that mixed precision updates."""

WORKSPACE = 64 * 2**20
"""Bytes that libraries of products keep for themselves: cuBLAS 32 MiB on Hopper, 8 MiB before; Transformer Engine 32"""

UNITS = 2
"""Blocks whose gathered parameters FSDP holds at a time: the one that runs and the one that is prefetched."""


BUCKETS = 2 * 500_000_000
"""Elements of DeepSpeed's buckets for reducing gradients and gathering parameters, 500 million each unless configured
(deepspeed.ai/docs/config-json, reduce_bucket_size and allgather_bucket_size)."""


@dataclass(frozen=True, slots=True)
class PerParameter:
    """Bytes of one parameter that a rank holds of parameters, gradients and the optimizer's state."""

    weights: float
    gradients: float
    states: float


@lru_cache(maxsize=4096)
def memory(sizes: Sizes, setup: Setup) -> Memory:
    """Peak memory of the rank that needs most, in bytes."""
    stages = range(setup.pipeline)
    return max((memory_of_stage(sizes, setup, stage) for stage in stages), key=lambda found: found.total)


def per_parameter(setup: Setup) -> PerParameter:
    """Bytes of one parameter.

    Mixed precision takes 18 with gradients accumulated in float32 by the products themselves (Megatron-LM), 20 where
    they come in half precision first; float32 takes 16. The optimizer's part, and more with higher stages of ZeRO, is
    divided among the replicas. DeepSpeed's optimizer has gradients in float32 of its own; DDP has its buckets.
    """
    w, stack = activations.width(setup), setup.stack
    shards = setup.shards if setup.zero == 3 else setup.replicas
    if setup.zero == 3:  # FSDP keeps float32 shards and casts what it gathers
        return PerParameter(4 / shards, 4 / shards, MOMENTS / shards)
    mixed = w == 2
    gradients = float(stack.accumulation_bytes if mixed else 4)
    states = (MASTER if mixed else 0) + MOMENTS
    if stack.deepspeed and mixed:
        gradients = w if stack.accumulation_bytes == w else stack.accumulation_bytes + w
        states += 4 if stack.accumulation_bytes == w else 0
    elif stack.elementwise == "eager" and mixed:
        gradients += w
        if setup.zero == 0 and setup.replicas > 1:
            gradients += 2 * w
    return PerParameter(w, gradients / (1 if setup.zero < 2 else shards), states / (shards if setup.zero else 1))


def memory_of_stage(sizes: Sizes, setup: Setup, stage: int) -> Memory:
    """Peak memory of a rank of one stage of the pipeline, in bytes."""
    held = parameters_of_stages(sizes, setup)[stage]
    each = per_parameter(setup)
    under = under_way(setup, stage)
    saved = under * layers_of_stages(sizes, setup)[stage] * activations.saved(sizes, setup)
    buckets = 0
    if setup.stack.deepspeed:
        buckets = BUCKETS * activations.width(setup)
        if setup.pipeline > 1:  # a stage's output stays until its gradient arrives
            saved += under * activations.block_entry(sizes, setup)
    moment = activations.backward_moment(sizes, setup)
    if stage == setup.pipeline - 1:
        moment = max(moment, activations.loss_moment(sizes, setup))
    return Memory(
        parameters=round(held * each.weights),
        gradients=round(held * each.gradients),
        optimizer=round(held * each.states),
        activations=round(saved),
        temporary=round(moment + _gathered(sizes, setup) + buckets + WORKSPACE),
    )


def _gathered(sizes: Sizes, setup: Setup) -> float:
    """Parameters that FSDP has gathered, of blocks and of its root (embedding and output), and a block's gradients."""
    if setup.zero != 3:
        return 0.0
    w = activations.width(setup)
    root = sizes.embedding_parameters + sizes.head_parameters
    return (w * (UNITS * sizes.layer_parameters + root) + (w + 4) * sizes.layer_parameters) / setup.tensor
