"""Kernels of a transformer's block and ends as software runs them, counted by hand."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from round_numbers import GPU, NUMBERS, SIZES, H, L, S, V, computation, costs

from shardwise.predict.hardware.gpu import kernel_seconds
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.runtime import ends
from shardwise.predict.runtime.block import accumulation, block
from shardwise.predict.runtime.sizes import Sizes

pytestmark = pytest.mark.usefixtures("round_numbers")


def test_vocabulary_is_padded() -> None:
    # 50,257 is 392.6 times 128: 50,304 on one rank, 6,400 of 51,200 on each of eight
    assert computation().columns(V) == 50304
    assert computation(tensor=8).columns(V) == 6400
    assert computation(tensor=8, padded=False).columns(V) == 6283


def test_recomputation_ends_with_what_the_backward_pass_needs() -> None:
    passes = block(SIZES, computation(recompute="full", stops_early=True))
    left_out = passes.forward[len(passes.recomputed) :]
    assert [kernel.operation for kernel in left_out] == ["down", "residual"]
    assert passes.recomputed == passes.forward[: len(passes.recomputed)]
    assert block(SIZES, computation(recompute="full")).recomputed == passes.forward


@pytest.mark.parametrize(("early", "reductions"), [(True, 3), (False, 4)])
def test_the_last_reduction_is_not_repeated_either(early: bool, reductions: int) -> None:
    each = 2 * (7 / 8) * 2 * S * H / 100e9
    found = costs("tp=8,recompute=full", stops_early=early)
    exchanges = found.times.backward.between(1, 2).exchanges + found.times.again(1, 2).exchanges
    assert exchanges == pytest.approx(reductions * each, rel=1e-6)


def test_recomputed_kernels_are_no_work_of_the_model() -> None:
    plain, again = costs("dp=1"), costs("dp=1,recompute=full")
    assert again.model_flops == plain.model_flops
    assert again.times.again(1, 2).kernels == pytest.approx(plain.times.forward.between(1, 2).kernels)
    seconds = [each.prediction().compute_seconds for each in (again, plain)]
    assert seconds[0] - seconds[1] == pytest.approx(4 * plain.times.forward.between(1, L + 1).kernels)


def test_half_of_the_blocks_is_recomputed() -> None:
    whole, half, none = (
        costs("dp=1", recompute=name).times.backward.between(1, L + 1).kernels for name in ("full", "layers", "none")
    )
    assert half == pytest.approx((whole + none) / 2)


def test_every_second_product_is_recomputed() -> None:
    # torchtitan saves queries, values, gate and the last product; keys, the projection and the second of the gated pair
    # run again: 2 T h (kv + h + ffn) operations
    sizes = replace(SIZES, gated=True, kv_heads=8)
    passes = block(sizes, computation(recompute="operations", stops_early=True))
    products = [kernel for kernel in passes.recomputed if kernel.kind == "matmul"]
    assert sum(kernel.flops for kernel in products) == 2 * S * H * (H // 4 + H + 4 * H)
    assert not [kernel for kernel in passes.recomputed if kernel.kind == "attention"]


def test_norms_of_elementary_operations_move_more() -> None:
    gated = replace(SIZES, gated=True)

    def norms(sizes: Sizes, fused: bool) -> tuple[float, float]:
        passes = block(sizes, computation(fused_norms=fused))
        forward, backward = (
            next(kernel.bytes for kernel in kernels if kernel.operation == "norm")
            for kernels in (passes.forward, passes.backward)
        )
        return forward / (S * H), backward / (S * H)

    assert norms(gated, True) == norms(SIZES, False) == (4, 8)
    assert norms(gated, False) == (32, 96)  # of layer norms PyTorch has one kernel


@pytest.mark.parametrize(
    ("changes", "forward", "backward"),
    [
        ({"tensor": 8}, 1, 1),  # 4 matrices of scores
        ({"tensor": 16}, 5, 5),  # 2 of them: not a multiple of 4
        ({"tensor": 16, "micro_batch": 2}, 1, 1),
        ({"dtype": "float32"}, 2, 2),
    ],
)
def test_fused_softmax_wants_half_precision_and_groups_of_four(
    changes: dict[str, Any], forward: int, backward: int
) -> None:
    passes = block(SIZES, computation(attention="unfused", **changes))
    counts = [
        [kernel.operation for kernel in kernels].count("softmax") for kernels in (passes.forward, passes.backward)
    ]
    assert counts == [forward, backward]


def test_products_add_to_gradients_themselves() -> None:
    (plain,) = accumulation(computation(), 1000)
    assert plain.bytes == 1000 * (2 + 2 * 2)
    assert accumulation(computation(fused_accumulation=True), 1000) == []


def test_ends() -> None:
    (forward, _), (loss_forward, loss_backward) = (each(SIZES, computation()) for each in (ends.embedding, ends.head))
    assert [kernel.bytes for kernel in forward] == [4 * S * H]  # rows are read and written
    products = [kernel for kernel in (*loss_forward, *loss_backward) if kernel.kind == "matmul"]
    assert [kernel.flops for kernel in products] == [2 * S * 50304 * H] * 3
    assert [kernel.bytes for kernel in loss_forward if kernel.operation == "loss"] == [38 * S * 50304]


def test_a_kernel_takes_its_bytes_and_its_start() -> None:
    numbers = replace(NUMBERS, kernel_start=1e-3, product_start=2e-3)
    copy = Kernel("copy", "memory", "bf16", 0, 1e9, (1,))
    assert kernel_seconds(copy, GPU, numbers) == pytest.approx(1e-3 + 1e-3)
    # one whole wave of 100 tiles of 256 x 128 on 100 SMs, at the largest share of the datasheet's rate
    product = Kernel("product", "matmul", "bf16", 0, 0, (1, 2560, 1280, 1000))
    assert kernel_seconds(product, GPU, numbers) == pytest.approx(2 * 2560 * 1280 * 1000 / (0.96 * 1e14) + 2e-3)
