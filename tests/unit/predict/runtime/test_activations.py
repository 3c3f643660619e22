"""Bytes of a transformer's activations, against equations of papers and sums done by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from round_numbers import computation

from shardwise.predict.runtime import activations
from shardwise.predict.runtime.sizes import Computation, Sizes

S, B, H, A, L, V = 2048, 4, 1024, 16, 24, 50304
SIZES = Sizes(
    layers=L, hidden=H, heads=A, kv_heads=A, ffn=4 * H, vocab=V, sequence=S, gated=False, tied=True, biases=True
)
SBH, SCORES = S * B * H, 5 * S * S * B * A


def how(**changes: Any) -> Computation:
    return computation(**{"micro_batch": B, "dtype": "fp16", "dropout": True, "attention": "unfused", **changes})


def test_block_without_parallelism() -> None:
    # Korthikanti et al. 2022, equation 1: s b h (34 + 5 a s / h)
    assert activations.block_saved(SIZES, how()) == 34 * SBH + SCORES


def test_block_with_tensor_parallelism() -> None:
    # equation 2: s b h (10 + 24/t + 5 a s / (h t))
    assert activations.block_saved(SIZES, how(tensor=8)) == (10 + 24 / 8) * SBH + SCORES / 8


def test_block_with_sequence_parallelism() -> None:
    # equation 4: s b h / t (34 + 5 a s / h)
    assert activations.block_saved(SIZES, how(tensor=8, sequence_parallel=True)) == (34 * SBH + SCORES) / 8


def test_recomputation() -> None:
    assert activations.saved(SIZES, how(recompute="selective")) == 34 * SBH
    assert activations.saved(SIZES, how(recompute="full")) == 2 * SBH
    assert activations.saved(SIZES, how(recompute="full", tensor=4, sequence_parallel=True)) == 2 * SBH / 4


def test_flash_attention_keeps_a_float_per_row_instead_of_scores() -> None:
    assert activations.block_saved(SIZES, how(attention="flash")) == 34 * SBH + 4 * S * B * A


def test_gated_block_with_grouped_keys() -> None:
    sizes = replace(SIZES, kv_heads=4, gated=True, ffn=3072)
    plain = how(attention="flash", dropout=False, elementwise="te")
    # 2 bytes of: two norms and what they give (4h), queries, keys, values (1.5h), output (h), three of the MLP (9h)
    assert activations.block_saved(sizes, plain) == 2 * SBH * (4 + 1.5 + 1 + 9) + 4 * S * B * A
    eager = replace(plain, runtime=replace(plain.runtime, elementwise="eager"))
    # and queries and keys once more (1.25h), activated gate (3h)
    assert activations.block_saved(sizes, eager) == 2 * SBH * (4 + 2.75 + 1 + 12) + 4 * S * B * A


def test_selective_by_operation() -> None:
    sizes = replace(SIZES, kv_heads=4, gated=True, ffn=3072)
    # input, output of attention, and of products: queries (h), values (h/4), gate (3h), down (h)
    assert activations.saved(sizes, how(recompute="operations")) == 2 * SBH * (1 + 1 + 1 + 0.25 + 3 + 1)


def test_norms_that_use_their_output_keep_no_input() -> None:
    assert activations.block_saved(SIZES, how(norm_inputs=False)) == (34 - 4) * SBH + SCORES


def test_narrow_products_keep_narrow_inputs() -> None:
    # the results of both norms, the inputs of products, take one byte instead of two
    assert activations.block_saved(SIZES, how(linear_dtype="fp8")) == (34 - 2) * SBH + SCORES


def test_backward_pass() -> None:
    # of scores twice, of queries to output (4h), of the input
    gradients = 2 * 2 * S * B * A * S + 2 * SBH * 4 + 2 * SBH
    assert activations.backward_moment(SIZES, how()) == gradients
    assert activations.backward_moment(SIZES, how(recompute="full")) == gradients + 34 * SBH + SCORES
    assert activations.backward_moment(SIZES, how(recompute="selective")) == gradients + SCORES
    # without scores the MLP's gradients are the most: 4h before and after its activation
    assert activations.backward_moment(SIZES, how(attention="flash")) == 2 * SBH * 8 + 2 * SBH
