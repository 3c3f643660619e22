"""Peak memory of other software, against sums done by hand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import pytest
from round_numbers import RUNTIME, computation, costs

from shardwise.predict.closed_form.step_time import Costs
from shardwise.predict.prediction import Memory
from shardwise.predict.runtime import activations
from shardwise.predict.runtime.element_bytes import element_bytes
from shardwise.predict.runtime.profile import MOMENTS, WORKSPACE
from shardwise.predict.runtime.sizes import Sizes
from shardwise.strategy import Strategy

pytestmark = pytest.mark.usefixtures("round_numbers")

S, B, H, A, L, V = 2048, 4, 1024, 16, 24, 50304
SIZES = Sizes(
    layers=L, hidden=H, heads=A, kv_heads=A, ffn=4 * H, vocab=V, sequence=S, gated=False, tied=True, biases=True
)
SBH, SCORES = S * B * H, 5 * S * S * B * A
MEGATRON = replace(RUNTIME, attention="unfused", dropout=True)
EAGER = replace(RUNTIME, elementwise="eager", loss="eager", padded=False, gathered_bytes=2, gradient_bytes=4)


def found_of(spelled: str, **changes: Any) -> Costs:
    values = {"sizes": SIZES, "runtime": MEGATRON, "micro_batch": B, "dtype": "fp16", **changes}
    strategy = Strategy.parse(spelled)
    return costs(str(strategy if strategy.microbatches else strategy.with_(microbatches=16)), **values)


def stages(found: Costs) -> list[Memory]:
    """Return the peak memory of each worker of a pipeline."""
    return [found.memory_at(worker) for worker in found.parts.workers]


@pytest.mark.parametrize(
    ("spelled", "changes", "weights", "gradients", "states"),
    [
        ("dp=1", {}, 2, 2, 12),
        ("dp=1", {"accumulation_bytes": 4, "dtype": "bf16"}, 2, 4, 12),  # Megatron-LM: 18
        ("dp=1", {"accumulation_bytes": 4, "dtype": "bf16", "elementwise": "eager"}, 2, 6, 12),  # 20
        ("dp=8", {"accumulation_bytes": 4, "dtype": "bf16", "elementwise": "eager"}, 2, 10, 12),  # and DDP's buckets
        ("dp=1", {"dtype": "tf32"}, 4, 4, 8),  # 16
        ("dp=1", {"own_gradients": True}, 2, 2, 16),  # 20
        ("dp=1", {"own_gradients": True, "accumulation_bytes": 4, "dtype": "bf16"}, 2, 6, 12),  # 20
        ("fsdp=8", {}, 4, 4, 8),
    ],
)
def test_bytes_of_an_element(
    spelled: str, changes: Mapping[str, Any], weights: float, gradients: float, states: float
) -> None:
    how = computation(MEGATRON, **{"dtype": "fp16", **changes})
    found = element_bytes(how.runtime, how.linear_dtype, Strategy.parse(spelled))
    assert (found.weights, found.gradients, MOMENTS + found.copies) == (weights, gradients, states)


WHOLE = L * SIZES.layer_parameters + V * H + H


@pytest.mark.parametrize(
    ("spelled", "changes", "gradients", "states"),
    [
        ("dp=4", {}, 2, 16),
        ("fsdp=4,zero=1", {}, 2, 16 / 4),
        ("fsdp=4,zero=1", {"sharded_gradients": True}, 2 / 4, 16 / 4),
    ],
)
def test_replicas_hold_their_part(spelled: str, changes: Mapping[str, Any], gradients: float, states: float) -> None:
    found = found_of(spelled, own_gradients=True, **changes).memory
    assert (found.parameters, found.gradients, found.optimizer) == (2 * WHOLE, gradients * WHOLE, states * WHOLE)


def test_first_stage_of_a_pipeline() -> None:
    found, *_ = stages(found_of("pp=4,recompute=full"))
    held = 6 * SIZES.layer_parameters + V * H
    assert (found.parameters, found.gradients, found.optimizer) == (2 * held, 2 * held, 12 * held)
    assert found.activations == 4 * 6 * 2 * SBH + 34 * SBH + SCORES  # one block is computed again
    gradients = 2 * 2 * S * B * A * S + 2 * SBH * 4 + 2 * SBH  # of scores twice, of queries to output, of the input
    assert found.temporary == gradients + WORKSPACE


def test_tensor_parallel_ranks_hold_their_part_of_matrices() -> None:
    first, last = stages(found_of("tp=2,pp=2"))  # the vocabulary is padded to 2 x 128 x 197
    assert first.parameters == 2 * (6 * SIZES.layer_parameters + 128 * 197 * H)
    assert last.parameters == first.parameters + 2 * H


@pytest.mark.parametrize(
    ("spelled", "entries"),
    [
        # on each worker: microbatches x inputs of blocks, the last worker also has that of its output
        ("pp=4", [4 * 6, 3 * 6, 2 * 6, 6 + 1]),
        ("pp=4,microbatches=2", [2 * 6, 2 * 6, 2 * 6, 6 + 1]),
        ("pp=4,schedule=gpipe", [16 * 6, 16 * 6, 16 * 6, 16 * (6 + 1)]),
        # interleaved: p (1 + (p - 1) / (p v)) stages on the first rank (Korthikanti et al. 2022, section 4.2.3)
        ("pp=4,schedule=interleaved,stages=3", [4 * 6 * (1 + 3 / 12), 13 * 2, 11 * 2, 9 * 2 + 1]),
    ],
)
def test_microbatches_in_flight(spelled: str, entries: list[int]) -> None:
    found = found_of(f"{spelled},recompute=full")
    arriving = [min(1, sum(stage.received for stage in worker.stages)) for worker in found.parts.workers]
    again = [34 * SBH + SCORES] * 3 + [0]  # the last worker needs most at the loss
    peaks = zip(stages(found), again, strict=True)
    kept = [(each.activations - block) / (2 * SBH) for each, block in peaks]
    assert kept == [entry + message for entry, message in zip(entries, arriving, strict=True)]
    assert arriving[1:] == [1, 1, 1]


def test_the_stage_that_needs_most_is_told() -> None:
    found = found_of("pp=2,microbatches=1,recompute=full")
    first, last = (each.total for each in stages(found))
    assert last > first  # logits
    assert found.memory.total == last


def test_loss() -> None:
    # logits in half precision, two copies in float32; the last norm's result and its gradient; the output's gradient
    found = found_of("dp=1,recompute=full").memory
    assert found.activations == (L + 1) * 2 * SBH
    assert found.temporary == S * B * V * 10 + 4 * SBH + 2 * V * H + WORKSPACE
    fused = found_of("dp=1,recompute=full", fused_accumulation=True, loss="eager").memory
    assert fused.temporary == S * B * V * 14 + 4 * SBH + WORKSPACE
    split = found_of("tp=4,recompute=full", fused_accumulation=True).memory
    assert split.temporary == S * B * (V + 384) / 4 * 10 + 4 * SBH + WORKSPACE


def test_deepspeed_keeps_outputs_and_has_buckets() -> None:
    plain, *_ = stages(found_of("pp=4,recompute=full"))
    found, *_ = stages(found_of("pp=4,recompute=full", keeps_outputs=True, buffers=10**9))
    assert found.activations - plain.activations == 4 * 2 * SBH
    assert found.temporary - plain.temporary == 2 * 10**9


def test_recomputation_of_every_second_block() -> None:
    half, none = (stages(found_of("pp=4", recompute=name))[0] for name in ("layers", "none"))
    assert none.activations == 4 * 6 * (34 * SBH + SCORES)
    kept = 4 * (3 * 2 * SBH + 3 * (34 * SBH + SCORES))
    assert half.activations + half.temporary == kept + none.temporary


def test_fully_sharded_at_the_loss() -> None:
    found = found_of("fsdp=8,microbatches=1", runtime=EAGER, dtype="bf16").memory
    # shards in float32; gathered in half precision are embedding and last norm: the last block comes after the loss
    assert found.parameters == 4 * WHOLE / 8 + 2 * (V * H + H)
    assert (found.gradients, found.optimizer) == (0, 8 * WHOLE / 8)
    assert found.temporary == S * B * V * 14 + 4 * SBH + 2 * V * H + WORKSPACE


def test_fully_sharded_inside_a_block() -> None:
    sizes = replace(SIZES, vocab=128, tied=False)
    found = found_of("fsdp=8,microbatches=2", sizes=sizes, runtime=EAGER, dtype="bf16").memory
    whole, block = L * SIZES.layer_parameters + 2 * 128 * H + H, SIZES.layer_parameters
    # two blocks are gathered, and gradients of the output come in half precision; those of this block are reduced, in
    # float32, when what its backward pass needs for a moment is free, which is more; their sum over microbatches is a
    # shard
    assert found.parameters == 4 * whole / 8 + 2 * (2 * 128 * H + H + 2 * block)
    assert found.gradients == 4 * whole / 8
    moment = activations.backward_moment(sizes, computation(EAGER, micro_batch=B))
    assert found.temporary == moment + WORKSPACE + 2 * (128 * H + H)
