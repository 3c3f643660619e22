"""Two predictors of one GPT: from its traced graph, and from formulas that published runs confirm."""

from __future__ import annotations

import pytest

from shardwise.cluster.find import find_cluster
from shardwise.predict.closed_form.step_time import costs_of, predict
from shardwise.predict.hardware.gpu import kernel_seconds
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Profile
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.published.predictor import step_time as transformer
from shardwise.predict.published.predictor.block import block
from shardwise.predict.published.predictor.sizes import Setup, Sizes, Stack
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload
from shardwise.workload.recipes.models.gpt import inner_width

LAYERS, HIDDEN, HEADS, VOCABULARY, BATCH, SAMPLES = 24, 2304, 24, 8192, 512, 2
STACK = Stack(
    attention="flash",
    elementwise="eager",
    loss="eager",
    dropout=False,
    overlap_gradients=True,
    overlap_parameters=False,
    overlap_tensor=False,
    overlap_pipeline=False,
    scatter_pipeline=False,
    graphs=False,
    gradient_bytes=4,
    accumulation_bytes=4,
)
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


@pytest.fixture(scope="module")
def profiles() -> Profiles:
    spec = f"gpt:layers={LAYERS},hidden={HIDDEN},heads={HEADS},vocabulary={VOCABULARY},batch_size={BATCH}"
    return Profiles(load_workload(spec))


def setup_of(strategy: Strategy, dtype: str) -> Setup:
    return Setup(
        tensor=strategy.tp,
        pipeline=strategy.pp,
        data=strategy.replicas,
        context=1,
        sequence_parallel=bool(strategy.sp),
        chunks=1,
        zero=3 if strategy.fsdp > 1 else 0,
        shards=strategy.fsdp,
        micro_batch=SAMPLES,
        microbatches=strategy.microbatches,
        recompute=str(strategy.recompute),
        dtype=dtype,
        linear_dtype=dtype,
        scaling="",
        stack=STACK,
    )


def both(profiles: Profiles, text: str, cluster: str) -> tuple[Prediction, Prediction]:
    strategy = Strategy.parse(text).for_batch(BATCH)
    machines = find_cluster(cluster)
    formulas = transformer.predict(SIZES, setup_of(strategy, strategy.precision or "bf16"), machines)
    return predict(profiles.of(strategy), strategy, machines), formulas


@pytest.mark.parametrize("cluster", ["a100x32", "h100x32"])
@pytest.mark.parametrize(
    "strategy",
    [
        "dp=32,microbatches=8",
        "fsdp=32,microbatches=8",
        "dp=4,tp=8,microbatches=64",
        "dp=4,tp=8,sp=1,microbatches=64",
        "dp=8,pp=4,microbatches=32",
        "dp=8,tp=2,pp=2,microbatches=32",
        "dp=4,tp=2,sp=1,pp=4,microbatches=64",
    ],
)
def test_times_in_single_precision(profiles: Profiles, strategy: str, cluster: str) -> None:
    traced, formulas = both(profiles, f"{strategy},precision=float32", cluster)
    assert traced.step_seconds == pytest.approx(formulas.step_seconds, rel=0.12)
    assert traced.compute_seconds == pytest.approx(formulas.compute_seconds, rel=0.15)
    if strategy.startswith("dp=4,tp=8"):
        assert traced.exposed_communication_seconds == pytest.approx(formulas.exposed_communication_seconds, rel=0.15)


@pytest.mark.parametrize("strategy", ["dp=32,microbatches=8", "dp=4,tp=8,microbatches=64"])
def test_products_and_attention_in_half_precision(profiles: Profiles, strategy: str) -> None:
    """Only moves of values differ then: under autocast the residual stream and its gradients are float32.

    A few percent more than the formulas: the program starts a product each for the gate and the value of its MLP.
    """
    settled = Strategy.parse(strategy).for_batch(BATCH)
    profile = profiles.of(settled)
    passes = block(SIZES, setup_of(settled, "bf16"))
    device = find_cluster("a100x32").device(0)

    def busy(kernels: list[Kernel]) -> float:
        return sum(kernel_seconds(kernel, device) for kernel in kernels if kernel.kind in ("matmul", "attention"))

    layer = per_layer(profile)
    assert busy(layer) == pytest.approx(busy([*passes.forward, *passes.backward]), rel=0.07)


def per_layer(profile: Profile) -> list[Kernel]:
    """The kernels of the links of one transformer layer in the middle."""
    first, end = (min(profile.parameters[index].segments[0] for index in profile.blocks[n]) for n in (9, 10))
    layers = [link.layer for link in profile.segments[first:end]]
    return [kernel for layer in layers for each in (layer.forward, layer.backward) for kernel in each.kernels]


def test_gradients_of_the_residual_stream_are_exchanged_in_single_precision(profiles: Profiles) -> None:
    """Megatron exchanges two bytes for each element of activations and of gradients; autocast's gradients have four."""
    strategy = Strategy.parse("dp=4,tp=8,microbatches=64").for_batch(BATCH)
    profile = profiles.of(strategy)
    first, end = (min(profile.parameters[index].segments[0] for index in profile.blocks[n]) for n in (9, 10))
    layers = [link.layer for link in profile.segments[first:end]]
    elements = SAMPLES * 2048 * HIDDEN
    assert [e.bytes for layer in layers for e in layer.forward.exchanges] == [2 * elements] * 2
    assert [e.bytes for layer in layers for e in layer.backward.exchanges] == [4 * elements] * 2


def test_stages_are_about_equal(profiles: Profiles) -> None:
    """Every cut between layers sends the same, so that it has no say in where to cut."""
    strategy = Strategy.parse("dp=8,pp=4,microbatches=32").for_batch(BATCH)
    costs = costs_of(profiles.of(strategy), strategy, find_cluster("h100x32"))
    forward = costs.times.forward
    spent = [forward.between(stage.first, stage.end).total for stage in costs.parts.stages.values()]
    assert max(spent) < 1.12 * sum(spent) / len(spent)
