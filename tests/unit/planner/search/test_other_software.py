"""A search for other software looks at what that can run, all of it, and its bounds hold there too."""

from __future__ import annotations

import functools
from dataclasses import replace

import pytest
from small_gpt import everything

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.errors import RequestError
from shardwise.planner.constraints import Constraints
from shardwise.planner.explain import explanation, with_bandwidth
from shardwise.planner.search.memory_bounds import least_memory
from shardwise.planner.search.search import search
from shardwise.planner.search.sharded_bounds import sharded_seconds
from shardwise.planner.search.time_bounds import family_seconds, least_seconds, staged_seconds
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.source import ProfileSource
from shardwise.predict.profile.summary import summarize
from shardwise.predict.runtime.software import ABILITIES
from shardwise.predict.simulate import profiles_on, simulate
from shardwise.strategy import Strategy
from shardwise.units import format_bytes
from shardwise.workload.load import load_workload

SPEC = "gpt:layers=8,hidden=2048,heads=16,kv_heads=8,ffn=6144,vocabulary=8000,sequence=64,batch_size=16"
"""Large parameters and few tokens, so that a bound on what parameters take or send shows."""


@functools.cache
def cluster() -> Cluster:
    return find_cluster("h100x16")


@functools.cache
def source(runtime: str) -> ProfileSource:
    return profiles_on(load_workload(SPEC), cluster(), runtime)


@functools.cache
def predictions(runtime: str) -> dict[Strategy, Prediction]:
    """Every strategy of the software on eight devices."""
    profiles = source(runtime)
    constraints = Constraints(software=profiles.software)
    every = [
        strategy
        for strategy in everything(profiles.workload, 8, constraints, 10, (8,))
        if profiles.tensor_degrees().refusal(strategy.tp) is None
    ]
    return {strategy: predict(profiles.of(strategy), strategy, cluster()) for strategy in every}


@pytest.mark.parametrize("runtime", ABILITIES)
def test_the_grid_has_nothing_that_the_software_refuses(runtime: str) -> None:
    software = source(runtime).software
    assert software is not None
    assert len(predictions(runtime)) >= 12
    assert [software.refusal(strategy) for strategy in predictions(runtime)] == [None] * len(predictions(runtime))


@pytest.mark.parametrize("bandwidth", [1.0, 0.02], ids=["fast links", "slow links"])
@pytest.mark.parametrize("runtime", ABILITIES)
def test_no_strategy_costs_less_than_its_bounds(runtime: str, bandwidth: float) -> None:
    on = with_bandwidth(cluster(), cluster().levels[0].name, bandwidth)
    for strategy in predictions(runtime):
        profile = source(runtime).of(strategy)
        prediction = predict(profile, strategy, on)
        summary, seconds = summarize(profile), prediction.step_seconds * 1.0001
        assert least_memory(summary, strategy, on.device(0)) <= prediction.memory.total * 1.0001, strategy
        assert least_seconds(summary, strategy, on) <= seconds, strategy
        assert family_seconds(summary, strategy, on) <= seconds, strategy
        assert staged_seconds(profile, strategy, on) <= seconds, strategy
        assert sharded_seconds(profile, strategy, on) <= seconds, strategy


@pytest.mark.parametrize("runtime", ABILITIES)
def test_the_search_finds_what_trying_everything_finds(runtime: str) -> None:
    profiles = source(runtime)
    plan = search(profiles.workload, cluster(), 8, Constraints(), ScaledProfiles(profiles)).plan
    least = min(prediction.step_seconds for prediction in predictions(runtime).values())
    assert plan.best is not None
    assert plan.best.prediction.step_seconds <= least * 1.01
    assert plan.constraints.software is profiles.software
    assert all(profiles.software.refusal(each.strategy) is None for each in plan.candidates if profiles.software)


def test_what_does_not_fit_recomputes_a_part_where_the_software_can() -> None:
    profiles = source("megatron")
    most = simulate(profiles, Strategy(microbatches=1), cluster()).memory.total
    least = simulate(profiles, Strategy(microbatches=1).with_(recompute="full"), cluster()).memory.total
    tight = Constraints(max_memory=(most + least) // 2, fixed={"microbatches": "1"})
    plan = search(profiles.workload, cluster(), 1, tight, ScaledProfiles(profiles)).plan
    assert plan.best is not None
    assert plan.best.strategy.recompute.partial
    titan = source("torchtitan")
    tight = replace(tight, max_memory=simulate(titan, Strategy(microbatches=1), cluster()).memory.total - 1)
    whole = search(titan.workload, cluster(), 1, tight, ScaledProfiles(titan)).plan
    assert whole.best is not None
    assert str(whole.best.strategy.recompute) == "full"
    elements = sum(parameter.elements for parameter in profiles.of(Strategy()).parameters)
    parameters, gradients, state = (format_bytes(each * elements) for each in (2, 4, 12))  # bf16, float32, with a copy
    needs = explanation(plan, cluster(), profiles.of)[0]
    assert f"{parameters} of parameters, {gradients} of gradients, {state} of optimizer state" in needs


@pytest.mark.parametrize(
    ("runtime", "fix", "told"),
    [
        ("megatron", "zero=3", "--fix zero=3 --runtime megatron: Megatron-LM has zero=1, not zero=3"),
        ("deepspeed", "tp=2", "--fix tp=2 --runtime deepspeed: DeepSpeed has tp=1, not tp=2"),
        ("torchtitan", "outermost=dp", "--fix outermost=dp --runtime torchtitan: torchtitan places stages outermost"),
    ],
)
def test_a_fixed_value_that_the_software_never_has(runtime: str, fix: str, told: str) -> None:
    with pytest.raises(RequestError, match=told):
        Constraints.parse(fix=[fix]).check_software(source(runtime).software)


def test_memory_is_that_of_the_software() -> None:
    elements = sum(parameter.elements for parameter in source("megatron").of(Strategy()).parameters)
    megatron = simulate(source("megatron"), Strategy.parse("fsdp=8,zero=1"), cluster()).memory
    assert megatron.parameters + megatron.gradients == pytest.approx(6 * elements, rel=0.01)  # bf16, and float32 sums
    assert megatron.optimizer == pytest.approx(12 * elements / 8, rel=0.01)
    deepspeed = simulate(source("deepspeed"), Strategy.parse("fsdp=8,zero=1"), cluster()).memory
    assert deepspeed.parameters == pytest.approx(2 * elements, rel=0.01)
    assert deepspeed.temporary >= 2 * 2 * 500_000_000  # two buckets of half a billion bf16 gradients


def test_sharded_gradients_travel_in_the_dtype_of_the_computation() -> None:
    profile = source("accelerate").of(Strategy(fsdp=8))
    assert (profile.gathered, profile.scattered, profile.reduced) == (0.5, 0.5, 1.0)
    wide = source("accelerate").of(Strategy(fsdp=8, precision="float32"))
    assert (wide.gathered, wide.scattered, wide.reduced) == (1.0, 1.0, 1.0)
