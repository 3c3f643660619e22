"""Parts of a step's time from sizes, against sums done by hand on a made-up cluster with round numbers."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import pytest

from shardwise.cluster.cluster import Cluster, Device, Level, Nodes
from shardwise.collective import Collective, Group
from shardwise.predict.hardware.constants import Constants, constants
from shardwise.predict.hardware.gpu import kernel_seconds
from shardwise.predict.hardware.network import collective_seconds
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.published.predictor.block import accumulation, block
from shardwise.predict.published.predictor.embedding_head import embedding, head
from shardwise.predict.published.predictor.sizes import Setup, Sizes, Stack
from shardwise.predict.published.predictor.step_time import (
    ClusterTimes,
    Groups,
    _PublishedStep,
    explained,
    paced,
    predict,
)

H, L, V, S = 4096, 8, 50257, 2048
SIZES = Sizes(
    layers=L, hidden=H, heads=32, kv_heads=32, ffn=4 * H, vocab=V, sequence=S, gated=False, tied=True, biases=True
)
STACK = Stack(
    attention="flash",
    elementwise="megatron",
    loss="megatron",
    dropout=False,
    overlap_gradients=False,
    overlap_parameters=False,
    overlap_tensor=False,
    overlap_pipeline=False,
    scatter_pipeline=False,
    graphs=False,
    gradient_bytes=2,
    accumulation_bytes=2,
    padded=True,
)
GPU = Device(
    name="gpu",
    kind="gpu",
    flops={"bf16": 1e14, "float32": 1e14},
    memory_bytes=80 * 2**30,
    memory_bandwidth=1e12,
    cores=100,
    launch_seconds=0.0,
)
CLUSTER = Cluster(
    name="round",
    nodes=(Nodes(GPU, 8, 4),),
    levels=(
        Level(name="nvlink", span=8, bandwidth=100e9, latency=0.0),
        Level(name="infiniband", span=32, bandwidth=10e9, latency=0.0),
    ),
)
FREE = {field.name: 0.0 for field in fields(Constants)}
ONE = dict.fromkeys(("memory_share", "link_share", "network_share", "sustained_default", "attention_forward"), 1.0)
NUMBERS = Constants(**{**FREE, **ONE, "attention_backward": 1.0, "hosted_share": 0.5, "overlap_loss": 0.25})
"""Everything at its datasheet's rate, nothing for starts and hops, half of a network that the host drives."""


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
        "micro_batch": 1,
        "microbatches": 4,
        "recompute": "none",
        "dtype": "bf16",
        "linear_dtype": "bf16",
        "scaling": "",
        "stack": stack,
    }
    return Setup(**{**values, **changes})


def step(found: Setup, numbers: Constants = NUMBERS) -> _PublishedStep:
    return _PublishedStep(SIZES, found, ClusterTimes(CLUSTER, GPU, numbers), Groups.of(found), block(SIZES, found))


def test_vocabulary_is_padded() -> None:
    # 50,257 is 392.6 times 128: 50,304 on one rank, 6,400 of 51,200 on each of eight
    assert setup().columns(V) == 50304
    assert setup(tensor=8).columns(V) == 6400
    assert setup(tensor=8, padded=False).columns(V) == 6283


def test_all_reduces_of_tensor_parallelism() -> None:
    # two in each pass, of 2 x 2048 x 4096 bytes, 7/8 of them twice over 100 GB/s
    each = 2 * (7 / 8) * 2 * S * H / 100e9
    tensor = step(setup(tensor=8))
    assert tensor.tensor_parallel(2, backward=False)[0] == pytest.approx(2 * each, rel=1e-6)
    assert tensor.tensor_parallel(4, backward=True)[0] == pytest.approx(4 * each, rel=1e-6)


def test_backward_all_reduces_hide_behind_gradients_of_weights() -> None:
    each = 2 * (7 / 8) * 2 * S * H / 100e9
    tensor = step(setup(tensor=8, async_tensor=True))
    assert tensor.tensor_parallel(2, backward=False)[0] == pytest.approx(2 * each, rel=1e-6)
    exposed, total, _ = tensor.tensor_parallel(2, backward=True)
    assert exposed == pytest.approx(0.25 * 2 * each, rel=1e-6)
    assert total == pytest.approx(2 * each, rel=1e-6)


def test_sequence_parallelism_moves_as_much_in_two_halves() -> None:
    half = (7 / 8) * 2 * S * H / 100e9
    exposed, total, calls = step(setup(tensor=8, sequence_parallel=True)).tensor_parallel(2, backward=False)
    assert exposed == pytest.approx(4 * half, rel=1e-6)
    assert total == pytest.approx(4 * half, rel=1e-6)
    assert calls == 4


def test_messages_between_stages() -> None:
    # 2 x 2048 x 4096 bytes over 10 GB/s, forwards and backwards, for 4 microbatches and a pipeline of 4 to fill
    each = 2 * S * H / 10e9
    apart = setup(pipeline=4, tensor=8)
    assert step(apart).messages() == pytest.approx(2 * (4 + 3) * each, rel=1e-6)
    scattered = setup(pipeline=4, tensor=8, scatter_pipeline=True)
    assert step(scattered).messages() == pytest.approx(2 * (4 + 3) * each / 8, rel=1e-6)
    assert step(setup(pipeline=4, tensor=8, overlap_pipeline=True)).messages() == pytest.approx(2 * 3 * each, rel=1e-6)


def test_first_and_last_stage_sum_their_embeddings() -> None:
    # 2 bytes of 6,400 rows of 4,096 between two ranks of different nodes: once there and once back
    assert step(setup(pipeline=4, tensor=8)).tied_embedding() == pytest.approx(2 * 6400 * H / 10e9, rel=1e-6)
    assert step(setup(tensor=8)).tied_embedding() == 0.0


def test_gradients() -> None:
    held = step(setup(data=4, tensor=8)).parameters()
    assert held == (L * SIZES.layer_parameters + V * H + H) / 8
    # a ring over four nodes with one rank in each
    once = (3 / 4) * 2 * held / 10e9
    total, exposed, gathering = step(setup(data=4, tensor=8)).gradients(work=1e9)
    assert exposed == pytest.approx(2 * once, rel=1e-6)
    assert total == pytest.approx(2 * once, rel=1e-6)
    assert gathering == 0.0
    total, _, gathering = step(setup(data=4, tensor=8, zero=1)).gradients(work=1e9)
    assert total == pytest.approx(once, rel=1e-6)
    assert gathering == pytest.approx(once, rel=1e-6)
    total, _, _ = step(setup(data=4, tensor=8, zero=1, sharded_reduction=False)).gradients(work=1e9)
    assert total == pytest.approx(2 * once, rel=1e-6)
    _, exposed, _ = step(setup(data=4, tensor=8, overlap_gradients=True)).gradients(work=1e9)
    assert exposed == pytest.approx(0.25 * 2 * once, rel=1e-6)


def test_networks_that_the_host_drives_are_slower() -> None:
    reduce = Collective("all_reduce", 10**9, Group(4, 8))
    hosted = replace(CLUSTER, levels=(CLUSTER.levels[0], replace(CLUSTER.levels[1], name="omni-path-100")))
    assert collective_seconds(reduce, CLUSTER, NUMBERS) == pytest.approx(2 * (3 / 4) * 0.1)
    assert collective_seconds(reduce, hosted, NUMBERS) == pytest.approx(2 * (3 / 4) * 0.2)
    message = Collective("send", 10**9, Group(2, 8))
    assert collective_seconds(message, hosted, NUMBERS) == pytest.approx(0.2)


def test_bubble_of_a_pipeline() -> None:
    numbers = replace(NUMBERS, memory_share=1e6)  # products alone
    found = predict(SIZES, setup(pipeline=4, microbatches=8), CLUSTER, numbers)
    stages = [forward.seconds + backward.seconds for forward, backward in step(setup(pipeline=4), numbers).stages()]
    assert found.compute_seconds == pytest.approx(8 * stages[-1])  # the last one has the output
    assert found.bubble_seconds == pytest.approx(sum(stages[:-1]))
    interleaved = predict(SIZES, setup(pipeline=4, microbatches=8, chunks=2), CLUSTER, numbers)
    assert interleaved.bubble_seconds == pytest.approx(sum(stages[:-1]) / 2)


def test_the_host_is_waited_for_where_it_is_slower() -> None:
    slow = replace(NUMBERS, host_kernel=1.0)
    passes = block(SIZES, setup())
    found = step(setup(), slow)
    assert found.layer_forward().seconds == len(passes.forward)
    again = step(setup(recompute="full"), slow).layer_backward()
    assert again.seconds == len(passes.forward) + len(passes.backward)
    assert step(setup(graphs=True), slow).layer_forward().waiting == 0.0


def test_a_slow_end_does_not_hide_that_the_blocks_wait() -> None:
    # the loss of a vast vocabulary takes longer than the host needs for all blocks; they wait for it all the same
    numbers = replace(NUMBERS, host_kernel=1e-3)
    sizes = replace(SIZES, vocab=100 * V)
    found = setup()
    whole = _PublishedStep(sizes, found, ClusterTimes(CLUSTER, GPU, numbers), Groups.of(found), block(sizes, found))
    ((forward, _),) = whole.stages()
    assert forward.kernels > L * 1e-3 * len(block(sizes, found).forward)
    assert forward.waiting == pytest.approx(L * whole.layer_forward().waiting, rel=1e-12)
    assert whole.layer_forward().waiting > 0


def test_messages_take_time_of_the_host() -> None:
    numbers = replace(NUMBERS, host_message=1.0)
    stages = step(setup(pipeline=4), numbers).stages()
    ends = [step(setup()).clock.of(kernels(SIZES, setup())[0]) for kernels in (embedding, head)]
    assert [forward.waiting for forward, _ in stages] == pytest.approx([1 - ends[0], 2, 2, 1 - ends[1]])


def test_recomputation_ends_with_what_the_backward_pass_needs() -> None:
    passes = block(SIZES, setup(recompute="full", stops_early=True))
    left_out = passes.forward[len(passes.recomputed) :]
    assert [kernel.operation for kernel in left_out] == ["down", "residual"]
    assert passes.recomputed == passes.forward[: len(passes.recomputed)]
    assert block(SIZES, setup(recompute="full")).recomputed == passes.forward
    # the reduction of that product is not repeated either: three instead of four in the backward pass
    each = 2 * (7 / 8) * 2 * S * H / 100e9
    for early, reductions in ((True, 3), (False, 4)):
        found = step(setup(tensor=8, recompute="full", stops_early=early))
        assert found.layer_backward().communication == pytest.approx(reductions * each, rel=1e-6)


def test_half_of_the_blocks_is_recomputed() -> None:
    whole, half, none = (step(setup(recompute=name)).layer_backward().kernels for name in ("full", "layers", "none"))
    assert half == pytest.approx((whole + none) / 2)


def test_every_second_product_is_recomputed() -> None:
    # torchtitan saves queries, values, gate and the last product; keys, the projection and the second of the gated pair
    # run again: 2 T h (kv + h + ffn) operations
    sizes = replace(SIZES, gated=True, kv_heads=8)
    passes = block(sizes, setup(recompute="operations", stops_early=True))
    products = [kernel for kernel in passes.recomputed if kernel.kind == "matmul"]
    assert sum(kernel.flops for kernel in products) == 2 * S * H * (H // 4 + H + 4 * H)
    assert not [kernel for kernel in passes.recomputed if kernel.kind == "attention"]


def test_norms_of_elementary_operations_move_more() -> None:
    gated = replace(SIZES, gated=True)

    def norms(sizes: Sizes, fused: bool) -> tuple[float, float]:
        passes = block(sizes, setup(fused_norms=fused))
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
        ({"dtype": "float32", "linear_dtype": "float32"}, 2, 2),
    ],
)
def test_fused_softmax_wants_half_precision_and_groups_of_four(
    changes: dict[str, Any], forward: int, backward: int
) -> None:
    passes = block(SIZES, setup(attention="unfused", **changes))
    counts = [
        [kernel.operation for kernel in kernels].count("softmax") for kernels in (passes.forward, passes.backward)
    ]
    assert counts == [forward, backward]


def test_products_add_to_gradients_themselves() -> None:
    (plain,) = accumulation(setup(), 1000)
    assert plain.bytes == 1000 * (2 + 2 * 2)
    assert accumulation(setup(fused_accumulation=True), 1000) == []


def test_a_kernel_takes_its_bytes_and_its_start() -> None:
    numbers = replace(NUMBERS, kernel_start=1e-3, product_start=2e-3)
    copy = Kernel("copy", "memory", "bf16", 0, 1e9, (1,))
    assert kernel_seconds(copy, GPU, numbers) == pytest.approx(1e-3 + 1e-3)
    # one whole wave of 100 tiles of 256 x 128 on 100 SMs, at the largest share of the datasheet's rate
    product = Kernel("product", "matmul", "bf16", 0, 0, (1, 2560, 1280, 1000))
    assert kernel_seconds(product, GPU, numbers) == pytest.approx(2 * 2560 * 1280 * 1000 / (0.96 * 1e14) + 2e-3)


def test_who_waits_computes_faster() -> None:
    numbers = replace(NUMBERS, sustained_default=0.5, idle_boost=0.5)
    assert paced(1.0, GPU, "bf16", numbers) == 1.0
    assert paced(0.64, GPU, "bf16", numbers) == pytest.approx(0.8)
    assert paced(0.64, GPU, "float32", numbers) == 1.0
    assert paced(0.01, GPU, "bf16", numbers) == pytest.approx(0.5 / 0.96)  # no more than the datasheet's rate


def test_terms_add_up() -> None:
    found = predict(SIZES, setup(data=2, tensor=4, pipeline=4, zero=1), CLUSTER, constants())
    assert sum(explained(found).values()) == pytest.approx(found.step_seconds)
