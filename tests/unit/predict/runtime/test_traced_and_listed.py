"""One GPT twice: its kernels traced from its graph, and those that `runtime.block` lists for an eager program."""

from __future__ import annotations

from dataclasses import replace

import pytest

from shardwise.cluster.find import find_cluster
from shardwise.predict.closed_form.step_time import Costs, costs_of
from shardwise.predict.hardware.gpu import kernel_seconds
from shardwise.predict.profile.profile import Layer, Profile
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.runtime import known
from shardwise.predict.runtime.profile import transformer_profile
from shardwise.predict.runtime.sizes import Computation, Sizes
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.models.gpt import inner_width

LAYERS, HIDDEN, HEADS, VOCABULARY, BATCH, SAMPLES = 24, 2304, 24, 8192, 512, 2
SIZES = Sizes(
    layers=LAYERS,
    hidden=HIDDEN,
    heads=HEADS,
    kv_heads=HEADS,
    ffn=inner_width(HIDDEN),
    vocab=VOCABULARY,
    sequence=2048,
    gated=True,
    tied=False,
)
RESIDUAL = SAMPLES * 2048 * HIDDEN
"""Elements of the residual stream of a microbatch."""

EAGER = replace(known.FSDP, fused_norms=True, async_tensor=True)

STRATEGIES = [
    "dp=32,microbatches=8",
    "fsdp=32,microbatches=8",
    "dp=4,tp=8,microbatches=64",
    "dp=4,tp=8,sp=1,microbatches=64",
    "dp=8,pp=4,microbatches=32",
    "dp=8,tp=2,pp=2,microbatches=32",
    "dp=4,tp=2,sp=1,pp=4,microbatches=64",
]


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    spec = f"gpt:layers={LAYERS},hidden={HIDDEN},heads={HEADS},vocabulary={VOCABULARY},batch_size={BATCH}"
    return Profiles(load_workload(spec))


def both(profiles: Profiles, spelled: str, dtype: str) -> tuple[Profile, Profile, Strategy]:
    """Return the traced profile, the listed one, and the strategy that they are for."""
    strategy = Strategy.parse(f"{spelled},precision={dtype}").for_batch(BATCH)
    how = Computation(
        tensor=strategy.tp,
        context=1,
        sequence_parallel=bool(strategy.sp),
        micro_batch=SAMPLES,
        recompute="none",
        dtype=dtype,
        linear_dtype=dtype,
        scaling="",
        runtime=known.in_precision(EAGER, dtype),
    )
    return profiles.of(strategy), transformer_profile(SIZES, how, BATCH), strategy


def middle(profile: Profile) -> tuple[int, int]:
    """Return the range of segments of one transformer block in the middle."""
    first, end = (min(profile.parameters[index].segments[0] for index in profile.blocks[n]) for n in (9, 10))
    return first, end


def layers_of(profile: Profile) -> list[Layer]:
    first, end = middle(profile)
    return [segment.layer for segment in profile.segments[first:end]]


def busy(profile: Profile) -> float:
    """Return the seconds of a block's products and attention, forward and backward."""
    device = find_cluster("a100x32").device(0)
    kernels = [k for layer in layers_of(profile) for each in (layer.forward, layer.backward) for k in each.kernels]
    return sum(kernel_seconds(kernel, device) for kernel in kernels if kernel.kind in ("matmul", "attention"))


def saved(profile: Profile) -> int:
    """Return the bytes that a block saves for its backward pass."""
    first, end = middle(profile)
    return profile.saved[end] - profile.saved[first]


@pytest.mark.parametrize("dtype", ["float32", "bf16"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_products_attention_and_flops(profiles: Profiles, strategy: str, dtype: str) -> None:
    """A few percent more seconds are traced: the program starts a product each for gate and value of its MLP."""
    traced, listed, _ = both(profiles, strategy, dtype)
    assert traced.flops == pytest.approx(listed.flops, rel=0.002)
    assert 1 <= busy(traced) / busy(listed) < 1.05


@pytest.mark.parametrize("strategy", [each for each in STRATEGIES if "sp=1" not in each])
def test_bytes_saved_for_the_backward_pass(profiles: Profiles, strategy: str) -> None:
    """They are equal within 6%, which are the roots of norms and rows of attention."""
    for dtype in ("float32", "bf16"):
        traced, listed, _ = both(profiles, strategy, dtype)
        assert saved(traced) == pytest.approx(saved(listed), rel=0.06)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_parameters(profiles: Profiles, strategy: str) -> None:
    traced, listed, _ = both(profiles, strategy, "float32")
    assert sum(each.bytes for each in traced.parameters if each.trained) == pytest.approx(
        sum(each.bytes for each in listed.parameters), rel=0.002
    )


@pytest.mark.parametrize("cluster", ["a100x32", "h100x32"])
@pytest.mark.parametrize("spelled", STRATEGIES)
def test_times_in_single_precision(profiles: Profiles, spelled: str, cluster: str) -> None:
    *pair, strategy = both(profiles, spelled, "float32")
    machines = find_cluster(cluster)
    traced, listed = (costs_of(profile, strategy, machines).prediction() for profile in pair)
    assert traced.step_seconds == pytest.approx(listed.step_seconds, rel=0.12)
    assert traced.compute_seconds == pytest.approx(listed.compute_seconds, rel=0.15)
    if spelled.startswith("dp=4,tp=8"):
        assert traced.exposed_communication_seconds == pytest.approx(listed.exposed_communication_seconds, rel=0.15)


def test_the_residual_stream_is_exchanged_in_half_precision(profiles: Profiles) -> None:
    """Megatron exchanges two bytes for each element of activations and of gradients, and so does Shardwise."""
    traced, listed, _ = both(profiles, "dp=4,tp=8,microbatches=64", "bf16")

    def sizes(profile: Profile) -> list[list[int]]:
        layers = layers_of(profile)
        passes = [[each for layer in layers for each in (layer.forward, layer.backward)[n].exchanges] for n in (0, 1)]
        return [[each.bytes for each in exchanges] for exchanges in passes]

    assert sizes(traced) == sizes(listed) == [[2 * RESIDUAL] * 2, [2 * RESIDUAL] * 2]


def test_stages_are_about_equal(profiles: Profiles) -> None:
    """Every cut between layers sends the same, so that it has no say in where to cut."""

    def spent(found: Costs) -> list[float]:
        forward = found.times.forward
        return [forward.between(stage.first, stage.end).total for stage in found.parts.stages.values()]

    *pair, strategy = both(profiles, "dp=8,pp=4,microbatches=32", "bf16")
    for profile in pair:
        seconds = spent(costs_of(profile, strategy, find_cluster("h100x32")))
        assert max(seconds) < 1.12 * sum(seconds) / len(seconds)
