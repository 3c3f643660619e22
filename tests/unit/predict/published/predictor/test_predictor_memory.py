"""Peak memory from sizes, against sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardwise.predict.published.predictor import activations
from shardwise.predict.published.predictor.memory import WORKSPACE, memory, memory_of_stage, per_parameter
from shardwise.predict.published.predictor.sizes import Setup, Sizes, Stack
from shardwise.predict.published.predictor.stages import layers_of_stages, parameters_of_stages, under_way

S, B, H, A, L, V = 2048, 4, 1024, 16, 24, 50304
SIZES = Sizes(
    layers=L, hidden=H, heads=A, kv_heads=A, ffn=4 * H, vocab=V, sequence=S, gated=False, tied=True, biases=True
)
STACK = Stack(
    attention="unfused",
    elementwise="megatron",
    loss="megatron",
    dropout=True,
    overlap_gradients=False,
    overlap_parameters=False,
    overlap_tensor=False,
    overlap_pipeline=False,
    scatter_pipeline=False,
    graphs=False,
    gradient_bytes=2,
    accumulation_bytes=2,
)


def setup(**changes: Any) -> Setup:
    stack = replace(STACK, **{name: changes.pop(name) for name in list(changes) if hasattr(STACK, name)})
    values: dict[str, Any] = {
        "tensor": 1,
        "pipeline": 1,
        "data": 1,
        "context": 1,
        "sequence_parallel": False,
        "chunks": 1,
        "zero": 0,
        "shards": 1,
        "micro_batch": B,
        "microbatches": 16,
        "recompute": "none",
        "dtype": "fp16",
        "linear_dtype": "fp16",
        "scaling": "",
        "stack": stack,
    }
    return Setup(**{**values, **changes})


SBH, SCORES = S * B * H, 5 * S * S * B * A


def test_block_without_parallelism() -> None:
    # Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h)
    assert activations.block_saved(SIZES, setup()) == 34 * SBH + SCORES


def test_block_with_tensor_parallelism() -> None:
    # equation 2: s b h (10 + 24/t + 5 a s / (h t))
    assert activations.block_saved(SIZES, setup(tensor=8)) == (10 + 24 / 8) * SBH + SCORES / 8


def test_block_with_sequence_parallelism() -> None:
    # equation 4: s b h / t (34 + 5 a s / h)
    assert activations.block_saved(SIZES, setup(tensor=8, sequence_parallel=True)) == (34 * SBH + SCORES) / 8


def test_recomputation() -> None:
    assert activations.saved(SIZES, setup(recompute="selective")) == 34 * SBH
    assert activations.saved(SIZES, setup(recompute="full")) == 2 * SBH
    assert activations.saved(SIZES, setup(recompute="full", tensor=4, sequence_parallel=True)) == 2 * SBH / 4
    assert activations.saved(SIZES, setup(recompute="layers")) == (2 * SBH + 34 * SBH + SCORES) / 2


def test_flash_attention_keeps_a_float_per_row_instead_of_scores() -> None:
    assert activations.block_saved(SIZES, setup(attention="flash")) == 34 * SBH + 4 * S * B * A


def test_gated_block_with_grouped_keys() -> None:
    sizes = replace(SIZES, kv_heads=4, gated=True, ffn=3072)
    plain = setup(attention="flash", dropout=False, elementwise="te")
    # 2 bytes of: two norms and what they give (4h), queries, keys, values (1.5h), output (h), three of the MLP (9h)
    assert activations.block_saved(sizes, plain) == 2 * SBH * (4 + 1.5 + 1 + 9) + 4 * S * B * A
    eager = replace(plain, stack=replace(plain.stack, elementwise="eager"))
    # and queries and keys once more (1.25h), activated gate (3h)
    assert activations.block_saved(sizes, eager) == 2 * SBH * (4 + 2.75 + 1 + 12) + 4 * S * B * A


def test_selective_by_operation() -> None:
    sizes = replace(SIZES, kv_heads=4, gated=True, ffn=3072)
    # input, output of attention, and of products: queries (h), values (h/4), gate (3h), down (h)
    assert activations.saved(sizes, setup(recompute="operations")) == 2 * SBH * (1 + 1 + 1 + 0.25 + 3 + 1)


def test_loss() -> None:
    # logits in half precision, two copies in float32; the output layer's input and the last norm's
    assert activations.loss_moment(SIZES, setup()) == S * B * V * 10 + 4 * SBH
    assert activations.loss_moment(SIZES, setup(tensor=4, loss="eager")) == S * B * V / 4 * 14 + 4 * SBH


@pytest.mark.parametrize(
    ("changes", "weights", "gradients", "states"),
    [
        ({}, 2, 2, 12),
        ({"accumulation_bytes": 4, "dtype": "bf16"}, 2, 4, 12),  # Megatron-LM: 18
        ({"accumulation_bytes": 4, "dtype": "bf16", "data": 8, "zero": 1}, 2, 4, 12 / 8),  # distributed optimizer
        ({"accumulation_bytes": 4, "dtype": "bf16", "elementwise": "eager"}, 2, 6, 12),  # 20
        ({"dtype": "tf32"}, 4, 4, 8),  # 16
        ({"deepspeed": True}, 2, 2, 16),  # 20
        ({"deepspeed": True, "data": 4, "zero": 1}, 2, 2, 16 / 4),
        ({"deepspeed": True, "data": 4, "zero": 2}, 2, 2 / 4, 16 / 4),
        ({"data": 8, "zero": 3, "shards": 8}, 4 / 8, 4 / 8, 8 / 8),
    ],
)
def test_bytes_per_parameter(changes: dict[str, Any], weights: float, gradients: float, states: float) -> None:
    found = per_parameter(setup(**changes))
    assert (found.weights, found.gradients, found.states) == (weights, gradients, states)


def test_microbatches_under_way() -> None:
    four = setup(pipeline=4)
    assert [under_way(four, stage) for stage in range(4)] == [4, 3, 2, 1]
    assert under_way(replace(four, microbatches=2), 0) == 2
    assert under_way(replace(four, schedule="gpipe"), 3) == 16
    # interleaved: p (1 + (p - 1) / (p v)) stages on the first rank (Korthikanti et al. 2022, section 4.2.3)
    assert under_way(replace(four, chunks=3), 0) == 4 * (1 + 3 / 12)
    assert under_way(replace(four, chunks=3), 3) == 3


def test_stages() -> None:
    assert layers_of_stages(SIZES, setup(pipeline=4)) == [6, 6, 6, 6]
    assert layers_of_stages(replace(SIZES, layers=22), setup(pipeline=4)) == [5, 6, 6, 5]
    assert layers_of_stages(replace(SIZES, layers=25), setup(pipeline=4)) == [7, 6, 6, 6]
    # an output of 4.09 blocks: 28.09 blocks in two halves of 14.05, and the block that reaches it
    assert layers_of_stages(SIZES, setup(pipeline=2, balanced=True)) == [15, 9]
    held = parameters_of_stages(SIZES, setup(pipeline=2, tensor=2))
    assert held[0] == (12 * SIZES.layer_parameters + V * H) / 2
    assert held[1] == (12 * SIZES.layer_parameters + V * H + H) / 2


def test_first_stage_of_a_pipeline() -> None:
    found = memory_of_stage(SIZES, setup(pipeline=4, recompute="full"), 0)
    held = 6 * SIZES.layer_parameters + V * H
    assert (found.parameters, found.gradients, found.optimizer) == (2 * held, 2 * held, 12 * held)
    assert found.activations == 4 * 6 * 2 * SBH
    again = 34 * SBH + SCORES
    gradients = 2 * 2 * S * B * A * S + 2 * SBH * 4 + 2 * SBH  # of scores twice, of queries to output, of the input
    assert found.temporary == again + gradients + WORKSPACE


def test_deepspeed_keeps_outputs_and_has_buckets() -> None:
    plain = memory_of_stage(SIZES, setup(pipeline=4, recompute="full"), 0)
    found = memory_of_stage(SIZES, setup(pipeline=4, recompute="full", deepspeed=True), 0)
    assert found.activations - plain.activations == 4 * 2 * SBH
    assert found.temporary - plain.temporary == 2 * 10**9


def test_fully_sharded() -> None:
    changes = {"zero": 3, "data": 8, "shards": 8, "attention": "flash", "elementwise": "eager", "loss": "eager"}
    found = memory(SIZES, setup(**changes))
    whole = L * SIZES.layer_parameters + V * H + H
    assert found.parameters == whole // 2
    # two gathered blocks, a block's gradient in half precision and in float32, the root's embedding
    gathered = 2 * 2 * SIZES.layer_parameters + 6 * SIZES.layer_parameters + 2 * V * H
    assert found.temporary == S * B * V * 14 + 4 * SBH + gathered + WORKSPACE


def test_the_stage_that_needs_most_is_told() -> None:
    few = setup(pipeline=2, microbatches=1, recompute="full")
    first, last = (memory_of_stage(SIZES, few, stage).total for stage in range(2))
    assert last > first  # logits
    assert memory(SIZES, few).total == last
