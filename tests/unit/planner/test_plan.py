"""The search against trying everything, its wishes, its words and its file."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from hosts import quick
from small_gpt import SPEC, can_be_cut, everything

from shardwise.cluster.cluster import Cluster
from shardwise.cluster.find import find_cluster
from shardwise.cluster.toml_writer import write_cluster
from shardwise.commands.plan import checked, planned
from shardwise.commands.request import TrainingRequest, settle, settle_strategy
from shardwise.errors import DoesNotFit, RequestError, StrategyError
from shardwise.options import NONE, Recompute
from shardwise.planner.constraints import Constraints
from shardwise.planner.explain import explanation, with_bandwidth
from shardwise.planner.plan_file import PlanFile, read_plan, write_plan
from shardwise.planner.scaling import Point, counts, enlarged, worth
from shardwise.planner.search.candidates import family_of
from shardwise.planner.search.memory_bounds import least_memory
from shardwise.planner.search.search import SearchResult, search
from shardwise.planner.search.sharded_bounds import sharded_seconds
from shardwise.planner.search.time_bounds import family_seconds, least_seconds, staged_seconds, summed_seconds
from shardwise.predict.closed_form.step_time import predict
from shardwise.predict.closed_form.unequal_shares import predict_shares
from shardwise.predict.profile.interpolate import ScaledProfiles
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.profile.summary import summarize
from shardwise.predict.timeline.timeline import timeline
from shardwise.strategy import Strategy
from shardwise.units import parse_bytes
from shardwise.workload.load import load_workload
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload


def with_memory(cluster: Cluster, size: int) -> Cluster:
    nodes = tuple(replace(n, device=replace(n.device, memory_bytes=size)) for n in cluster.nodes)
    return replace(cluster, nodes=nodes)


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch, profiles: ScaledProfiles) -> None:
    """Let plans of the small GPT take the profiles that are traced already."""

    def saved(workload: Workload, cluster: Cluster, runtime: str = "shardwise") -> Profiles:
        assert workload.name == profiles.traced.workload.name
        assert isinstance(profiles.traced, Profiles)
        assert cluster.device(0).kind == profiles.traced.device
        return profiles.traced

    for module in ("planner.scaling", "commands.plan"):
        monkeypatch.setattr(f"shardwise.{module}.profiles_on", saved)


@pytest.fixture(scope="module")
def tried(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> dict[Strategy, Any]:
    """Predict every strategy for 4 devices that the model can be cut for."""
    segments = len(profiles.of(Strategy()).segments)
    every = everything(workload, 4, Constraints(), segments)
    found = {strategy: profiles.traced.of(strategy) for strategy in every}
    return {s: predict(profile, s, cluster) for s, profile in found.items() if can_be_cut(profile, s)}


def test_the_search_finds_what_trying_everything_finds(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster, tried: dict[Strategy, Any]
) -> None:
    plan = search(workload, cluster, 4, Constraints(), profiles).plan
    best = min(tried.values(), key=lambda prediction: prediction.step_seconds)
    assert plan.fastest is not None
    assert plan.fastest.prediction.step_seconds <= best.step_seconds * 1.001
    assert plan.looked_at < len(tried)
    known = sum(entry.count for entry in plan.rejected if entry.kind == "slower") + plan.looked_at
    assert known >= len(tried) - sum(entry.kind in ("model", "memory") for entry in plan.rejected)


def test_no_strategy_costs_less_than_its_bounds(profiles: ScaledProfiles, cluster: Cluster, tried: Any) -> None:
    for strategy, prediction in tried.items():
        profile = summarize(profiles.traced.of(strategy))
        assert least_seconds(profile, strategy, cluster) <= prediction.step_seconds * 1.0001, strategy
        assert least_memory(profile, strategy, cluster.device(0)) <= prediction.memory.total, strategy


@pytest.fixture(scope="module")
def deep() -> ScaledProfiles:
    workload = load_workload("gpt:layers=24,hidden=512,heads=8,vocabulary=512,sequence=128,batch_size=64")
    return ScaledProfiles(Profiles(workload))


@pytest.mark.parametrize(("slower", "fix"), [(1, []), (1000, []), (1000, ["reduce=bf16"])])
def test_bounds_hold_for_deep_pipelines_too(deep: ScaledProfiles, slower: float, fix: list[str]) -> None:
    """Stages of a few layers each, many microbatches, sharded replicas: a sample of all there are; and slow links."""
    workload, profiles, fast = deep.traced.workload, deep, find_cluster("h100x32")
    between = (replace(level, bandwidth=level.bandwidth / slower) for level in fast.levels[1:])
    cluster = replace(fast, levels=(fast.levels[0], *between))
    constraints = Constraints.parse(fix=fix)
    chosen = random.Random(1).sample(everything(workload, 32, constraints, len(profiles.one().segments)), 250)
    checked = 0
    for strategy in chosen:
        if strategy.tp > 8:
            continue
        profile, summary = profiles.of(strategy), profiles.summary(strategy)
        prediction = predict(profile, strategy, cluster)
        seconds = prediction.step_seconds * 1.0001
        assert least_memory(summary, strategy, cluster.device(0)) <= prediction.memory.total * 1.0001, strategy
        assert family_seconds(summary, strategy, cluster) <= seconds, strategy
        assert least_seconds(summary, strategy, cluster) <= seconds, strategy
        if strategy.pp > 1:
            assert staged_seconds(profile, strategy, cluster) <= seconds, strategy
            assert staged_seconds(profile, family_of(strategy), cluster) <= seconds, strategy
        assert sharded_seconds(profile, strategy, cluster) <= seconds, strategy
        assert summed_seconds(profile, strategy, cluster) <= seconds, strategy
        checked += 1
    assert checked > 100


def test_a_single_microbatch_does_not_wait_for_gradients_that_are_put_off() -> None:
    """Each stage of a zero-bubble pipeline computes those of its weights after it has sent the others back."""
    workload = load_workload("gpt:layers=8,hidden=4096,heads=32,vocabulary=512,sequence=2048,batch_size=4")
    profiles, cluster = ScaledProfiles(Profiles(workload)), find_cluster("h100x8")
    strategy = Strategy.parse("pp=8,microbatches=1,schedule=zero-bubble,recompute=full")
    seconds = predict(profiles.of(strategy), strategy, cluster).step_seconds
    assert staged_seconds(profiles.of(strategy), strategy, cluster) <= seconds


SHARDED = {
    "pp": (2, 4, 8),
    "fsdp": (2, 8),
    "dp": (1, 2),
    "tp": (1, 2),
    "zero": (2, 3),
    "recompute": ("none", "selective", "full", "1/3"),
}
"""Values of each option of pipelines with sharded parameters; a sample of them is compared with its bounds."""


@pytest.mark.parametrize("schedule", ["1f1b", "gpipe", "zero-bubble", "interleaved,stages=2", "interleaved,stages=3"])
@pytest.mark.parametrize("bandwidth", [1, 30], ids=["fast links", "slow links"])
def test_no_sharded_pipeline_costs_less_than_its_bound(deep: ScaledProfiles, schedule: str, bandwidth: float) -> None:
    """Short and long tables of passes, with links so fast that compute binds, and so slow that collectives do."""
    fast = find_cluster("h100x256")
    levels = tuple(replace(level, bandwidth=level.bandwidth / bandwidth) for level in fast.levels)
    cluster, ratios = replace(fast, levels=levels), []
    for values in random.Random(2).sample(list(product(*SHARDED.values())), 60):
        options = ",".join(f"{name}={value}" for name, value in zip(SHARDED, values, strict=True))
        plain = Strategy.parse(f"{options},schedule={schedule}")
        for microbatches in (1, 2, 4, 8, 16, 32):
            strategy = plain.with_(microbatches=microbatches)
            try:
                prediction = predict(profile := deep.of(strategy), strategy, cluster)
            except StrategyError:
                continue
            bound = sharded_seconds(profile, strategy, cluster)
            assert bound <= prediction.step_seconds * 1.0001, strategy
            ratios.append(bound / prediction.step_seconds)
    assert len(ratios) > 40
    assert max(ratios) > 0.2


SUMMED = {
    "pp": (2, 4, 8),
    "dp,fsdp,zero": ("2,1,3", "32,1,3", "1,4,1", "1,32,1", "2,4,1"),
    "tp,sp": ("1,0", "2,0", "2,1"),
    "recompute": ("none", "selective", "full", "1/3"),
    "schedule,stages": ("1f1b,1", "gpipe,1", "interleaved,2", "interleaved,3"),
    "microbatches": (32, 64, 128, 256),
}
"""Values of each option of pipelines with whole parameters; a sample of them is compared with its bounds."""


@pytest.mark.parametrize("bandwidth", [1, 30], ids=["fast links", "slow links"])
def test_no_pipeline_with_summed_gradients_costs_less_than_its_bound(deep: ScaledProfiles, bandwidth: float) -> None:
    """Replicas that all-reduce gradients, with and without updates of their own parts (zero=1)."""
    fast = find_cluster("h100x512")
    levels = tuple(replace(level, bandwidth=level.bandwidth / bandwidth) for level in fast.levels)
    cluster, ratios, waits = replace(fast, levels=levels), [], []
    for values in random.Random(3).sample(list(product(*SUMMED.values())), 200):
        options = dict(zip(",".join(SUMMED).split(","), ",".join(map(str, values)).split(","), strict=True))
        strategy = Strategy.parse(",".join(f"{name}={value}" for name, value in options.items()))
        profile = deep.of(strategy, size := strategy.replicas * strategy.microbatches)
        bound = summed_seconds(profile, strategy, cluster)
        seconds = predict(profile, strategy, cluster, size).step_seconds
        assert bound <= seconds * 1.0001, strategy
        if bound:
            ratios.append(bound / seconds)
            waits.append(bound > staged_seconds(profile, strategy, cluster))
    assert len(ratios) > 40
    assert max(ratios) > 0.2
    assert any(waits)


def test_as_few_blocks_as_must_be_are_computed_again(cluster: Cluster) -> None:
    """Between what a strategy needs with none and with all of them, and no other is as good in any part."""
    workload = load_workload("gpt:layers=4,hidden=256,heads=4,vocabulary=512,sequence=128,batch_size=16")
    profiles = ScaledProfiles(Profiles(workload))
    segments = len(profiles.of(Strategy()).segments)
    chosen: list[Recompute] = []
    for fixed in ({"fsdp": "4"}, {"tp": "2", "pp": "2"}, {}):
        whole = [s for s in everything(workload, 4, Constraints(fixed=fixed), segments) if not s.recomputes]
        fastest = min(whole, key=lambda s: predict(profiles.of(s), s, cluster).step_seconds)
        sizes = [memory(profiles, fastest.with_(recompute=word), cluster) for word in ("none", "full")]
        room = sum(sizes) // 2
        plan = search(workload, cluster, 4, Constraints(fixed=fixed, max_memory=room), profiles).plan
        assert plan.best is not None
        parts = [f"{count}/4" for count in range(1, 4)]
        tried = [s.with_(recompute=word) for s in whole for word in ("none", "full", *parts)]
        fitting = [
            prediction.step_seconds
            for prediction in (predict(profiles.traced.of(s), s, cluster) for s in tried)
            if prediction.memory.total <= room
        ]
        assert plan.best.prediction.memory.total <= room
        assert plan.best.prediction.step_seconds <= min(fitting) * 1.011
        chosen.append(plan.best.strategy.recompute)
    assert any(again.partial for again in chosen)


def memory(profiles: ScaledProfiles, strategy: Strategy, cluster: Cluster) -> int:
    return predict(profiles.of(strategy), strategy, cluster).memory.total


def test_the_part_that_is_asked_for_is_kept(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> None:
    plan = search(workload, cluster, 4, Constraints.parse(fix=["recompute=2/4"]), profiles).plan
    assert {candidate.strategy.recompute for candidate in plan.candidates} == {Recompute(1, 2)}
    plan = search(
        workload,
        with_memory(cluster, plan.candidates[0].prediction.memory.total),
        4,
        Constraints.parse(forbid=["recompute"]),
        profiles,
    ).plan
    assert {candidate.strategy.recompute for candidate in plan.candidates} <= {NONE}


def test_the_best_for_memory_is_the_smallest(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster, tried: Any
) -> None:
    plan = search(workload, cluster, 4, Constraints(objective="memory"), profiles).plan
    assert plan.best is not None
    smallest = min(prediction.memory.total for prediction in tried.values())
    assert plan.best.prediction.memory.total <= smallest * 1.01


def test_what_does_not_fit_is_not_chosen(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster, tried: Any
) -> None:
    sizes = sorted(prediction.memory.total for prediction in tried.values())
    room = sizes[len(sizes) // 10]
    plan = search(workload, cluster, 4, Constraints(max_memory=room), profiles).plan
    assert plan.best is not None
    assert plan.best.prediction.memory.total <= room
    fitting = [prediction for prediction in tried.values() if prediction.memory.total <= room]
    assert plan.best.prediction.step_seconds <= min(p.step_seconds for p in fitting) * 1.01
    assert any(entry.kind == "memory" for entry in plan.rejected)


@pytest.mark.parametrize(
    ("fix", "forbid"),
    [
        (["tp=2"], []),
        ([], ["dp", "fsdp"]),
        (["schedule=interleaved"], []),
        (["zero=1"], ["tp"]),
        (["outermost=pp"], []),
        (["reduce=bf16", "dp=1"], []),
        (["loss_pieces=4"], ["pp"]),
        (["states=8"], ["pp"]),
    ],
)
def test_wishes_are_met(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster, fix: list[str], forbid: list[str]
) -> None:
    constraints = Constraints.parse(fix=fix, forbid=forbid)
    plan = search(workload, cluster, 4, constraints, profiles).plan
    assert plan.candidates
    assert all(constraints.refusal(candidate.strategy) is None for candidate in plan.candidates)


@pytest.mark.parametrize(
    "option", ["bucket=5", "stages=2", "outermost=pp", "offload=1", "sp=1", "zero=2", "recompute=3/16", "reduce=bf16"]
)
def test_values_that_need_an_axis_are_taken(option: str) -> None:
    Constraints.parse(fix=[option])
    Constraints.parse(forbid=[option])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"objective": "speed"}, "objective=speed: known are time, memory, money"),
        ({"fix": ["tp=8"], "forbid": ["tp"]}, "--fix tp=8 and --forbid tp contradict each other"),
        ({"fix": ["schedule=gpipe"], "forbid": ["schedule=gpipe"]}, "contradict"),
        ({"fix": ["tp=8", "tp=4"]}, "--fix tp=8 and --fix tp=4 contradict each other"),
        ({"forbid": ["schedule=banana"]}, "--forbid schedule=banana: schedule=banana: known are gpipe, 1f1b"),
        ({"forbid": ["tp=0"]}, "--forbid tp=0: tp=0: a degree is 1 or more"),
        ({"fix": ["tpp=8"]}, "unknown option 'tpp'"),
        ({"fix": ["tp"]}, "has no value"),
        ({"fix": ["zero=4"]}, "zero=4"),
        ({"fix": ["tp=1", "sp=1"]}, "sp=1 needs tp=2 or more"),
        ({"max_memory": "many"}, "--max-memory many: not a size"),
        ({"fix": ["speeds=3:1"]}, "--fix speeds=3:1: plan finds speeds itself where devices differ"),
        ({"fix": ["recompute=3/2"]}, "recompute=3/2: known are none, selective, full and parts of the blocks"),
        ({"fix": ["outermost=up"]}, "outermost=up: known are dp, pp"),
    ],
)
def test_wrong_wishes_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(RequestError, match=message.replace("=", "=").replace("(", r"\(")):
        Constraints.parse(**arguments)


def test_a_degree_that_does_not_divide_heads_keeps_its_reason(workload: Workload, profiles: ScaledProfiles) -> None:
    plan = search(workload, find_cluster("a100-40x8"), 8, Constraints.parse(forbid=["pp"]), profiles).plan
    reasons = [entry.reason for entry in plan.rejected if entry.strategy.tp == 8]
    assert any("does not divide the 4 attention heads" in reason for reason in reasons)


@pytest.mark.usefixtures("known")
def test_nothing_fits_says_by_how_much_and_what_would_do(cluster: Cluster, tmp_path: Path) -> None:
    with pytest.raises(DoesNotFit, match=r"needs least, .* too much: .*(would do|not help)"):
        planned(Source(workload=SPEC), "a100-40x4", 4, objective="time", max_memory="4MiB", fix=[], forbid=[], out=None)


def test_words_say_what_was_computed(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> None:
    searched: SearchResult = search(workload, cluster, 4, Constraints(), profiles)
    words = "\n".join(explanation(searched.plan, cluster, searched.profile_of))
    assert searched.plan.best is not None
    assert f"Chosen: {searched.plan.best.strategy}." in words
    assert "T = T_compute (1 + alpha)" in words
    for axis in ("dp=4", "fsdp=4", "tp=4"):
        assert axis in words


def test_slower_links_are_slower(workload: Workload, profiles: ScaledProfiles, cluster: Cluster) -> None:
    strategy = Strategy(dp=4)
    slow = with_bandwidth(cluster, cluster.levels[0].name, 0.01)
    profile = profiles.of(strategy)
    assert (
        predict(profile, strategy, quick(slow)).step_seconds > predict(profile, strategy, quick(cluster)).step_seconds
    )


def test_a_plan_file_is_read_as_it_was_written(tmp_path: Path) -> None:
    plan = PlanFile(
        workload=SPEC,
        strategy=Strategy.parse("dp=2,tp=2"),
        cuts=((0, 3), (5,)),
        settings={"batch_size": "8", "a key": 'with "quotes"'},
        cluster="h100x4",
        prediction={"step_seconds": 0.25},
        made_with={"torch": "2.13.0"},
    )
    write_plan(tmp_path / "plan.toml", plan)
    assert read_plan(tmp_path / "plan.toml") == plan
    assert [path.name for path in tmp_path.iterdir()] == ["plan.toml"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('version = 1\nworkload = "image"\nstrategy = "dp=0"\n', "dp=0"),
        ('version = 1\nworkload = "image"\nstrateg = "dp=2"\n', "unknown key strateg; did you mean 'strategy'"),
        ('version = 2\nworkload = "image"\nstrategy = "dp=2"\n', "version=2"),
        ('version = 1\nworkload = 3\nstrategy = "dp=2"\n', "workload=3: must be text"),
        ('version = 1\nworkload = "image"\nstrategy = "dp=2"\n[prediction]\nseconds = 1\n', "prediction.seconds"),
        ('version = 1\nworkload = "image"\nstrategy = "pp=2"\ncuts = [[0], [5, 4]]\n', "cuts=[[0], [5, 4]]: must be"),
        ('version = 1\nworkload = "image"\nstrategy = "pp=2"\ncuts = [0, 4]\n', "cuts=[0, 4]: must be"),
        ("version = ", "is not TOML"),
    ],
)
def test_wrong_plan_files_are_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "plan.toml"
    path.write_text(text)
    with pytest.raises(RequestError) as caught:
        read_plan(path)
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


@pytest.mark.usefixtures("known")
def test_a_plan_holds_where_it_was_made_and_not_on_slower_devices(tmp_path: Path) -> None:
    out, fast, slow = (tmp_path / name for name in ("plan.toml", "fast.toml", "slow.toml"))
    write_cluster(quick("a100-40x4"), fast)
    write_cluster(quick("l4x4"), slow)
    planned(Source(workload=SPEC), str(fast), None, objective="time", max_memory=None, fix=["dp=4"], forbid=[], out=out)
    assert checked(out)["holds"]
    slower = checked(out, str(slow))
    assert not slower["holds"]
    assert "off the" in slower["reasons"][0]
    assert not checked(out, "a100-40x2")["holds"]


def test_ranges_of_devices() -> None:
    assert counts(1, 8) == [1, 2, 4, 8]
    assert counts(3, 12) == [3, 4, 8, 12]


def test_more_devices_stop_paying_where_they_bring_less_than_half(cluster: Cluster) -> None:
    class Of:
        def __init__(self, workers: int, rate: float) -> None:
            self.workers, self.rate = workers, rate

    points: Any = [Of(1, 10.0), Of(2, 19.0), Of(4, 34.0), Of(8, 50.0), Of(16, 200.0)]
    found: Point | None = worth(points)
    assert found is not None
    assert found.workers == 4


def test_one_device_that_is_too_small_is_told_how_many_would_do() -> None:
    source = Source(workload="gpt:layers=4,hidden=2048,heads=16,vocabulary=512,sequence=128,batch_size=16")
    with pytest.raises(DoesNotFit, match=r"does not fit into 1 device of .*: \d+ of them would do"):
        planned(source, "a100-40x1", None, objective="time", max_memory="3GiB", fix=[], forbid=[], out=None)


@pytest.mark.parametrize("margin", [0.05, 0.0, 0.3])
def test_a_plan_leaves_the_margin_free(
    workload: Workload, profiles: ScaledProfiles, cluster: Cluster, tried: dict[Strategy, Any], margin: float
) -> None:
    """Devices that the fastest strategy would fill to within a thousandth."""
    fastest = min(tried.values(), key=lambda prediction: prediction.step_seconds)
    size = round((fastest.memory.total - fastest.memory.context) * 1.001)
    small = with_memory(cluster, size)
    asked = small if margin == 0.05 else small.with_margin(margin)
    with mock.patch("shardwise.predict.closed_form.device_memory._context", return_value=0):
        plan = search(workload, asked, 4, Constraints(), profiles).plan
        text = explanation(plan, asked, profiles.of)[1]
    assert plan.best is not None
    for candidate in plan.candidates:
        assert candidate.prediction.memory.total <= (1 - margin) * size
        assert candidate.prediction.fits
    best = plan.best.prediction
    assert (best.memory.total > 0.95 * size) == (margin == 0.0)
    assert f"{best.memory.total / best.memory_available:.0%}" in text
    assert f"with {margin:.0%} of its" in text


def test_a_larger_cluster_has_more_of_its_nodes(cluster: Cluster) -> None:
    larger = enlarged(cluster, 64)
    assert larger.size >= 64
    assert larger.levels[-1].span >= 64


@pytest.mark.parametrize(
    ("text", "size"), [("40GiB", 40 * 2**30), ("40GB", 40 * 10**9), ("1024", 1024), ("1.5k", 1500)]
)
def test_sizes(text: str, size: int) -> None:
    assert parse_bytes(text) == size


def test_train_takes_the_strategy_of_a_plan_file(tmp_path: Path) -> None:
    write_plan(tmp_path / "plan.toml", PlanFile(workload="image", strategy=Strategy(dp=2)))
    assert settle_strategy(str(tmp_path / "plan.toml"), 2) == Strategy(dp=2)
    with pytest.raises(RequestError, match="there is no such file"):
        settle_strategy(str(tmp_path / "none.toml"), None)


@pytest.mark.usefixtures("known")
def test_a_plan_with_a_pipeline_says_where_it_is_cut(tmp_path: Path) -> None:
    out = tmp_path / "plan.toml"
    planned(Source(workload=SPEC), "a100-40x4", 2, objective="time", max_memory=None, fix=["pp=2"], forbid=[], out=out)
    cuts = read_plan(out).cuts
    assert len(cuts) >= 2
    assert cuts[0][0] == 0
    job = settle(TrainingRequest(SPEC, strategy=str(out), steps=1), None, on_disk=False)
    assert job.cuts == cuts


# ---- devices of different speed -------------------------------------------------------------------------------------


def two_kinds(times: float) -> Cluster:
    """Two hosts with one A100 each, of which the second is so many times slower."""
    plain = find_cluster("a100-40x2")
    fast = plain.device(0)
    slow = replace(
        fast,
        flops={dtype: rate / times for dtype, rate in fast.flops.items()},
        memory_bandwidth=fast.memory_bandwidth / times,
    )
    segment = replace(plain.levels[0], name="nvlink", span=2)
    nodes = tuple(replace(plain.nodes[0], device=device, devices=1, count=1) for device in (fast, slow))
    return replace(plain, nodes=nodes, levels=(segment,))


LARGE = "gpt:layers=2,hidden=2048,heads=16,vocabulary=512,sequence=512,batch_size=12,precision=bf16"


@pytest.fixture(scope="module")
def large() -> ScaledProfiles:
    return ScaledProfiles(Profiles(load_workload(LARGE)))


def test_stages_lie_on_different_hosts_where_links_between_these_are_slow(large: ScaledProfiles) -> None:
    """Two hosts of two devices each: gradients are many, what stages hand to each other is little."""
    workload, profiles = large.traced.workload, large
    plain = quick("a100-40x4")
    inside = replace(plain.levels[0], span=2)
    between = replace(plain.levels[0], name="ethernet", span=4, bandwidth=1.25e9, latency=50e-6)
    nodes = (replace(plain.nodes[0], devices=2, count=2),)
    cluster = replace(plain, nodes=nodes, levels=(inside, between))
    tried = everything(workload, 4, Constraints(), len(profiles.of(Strategy()).segments), (2,))
    tried = [strategy for strategy in tried if can_be_cut(profiles.of(strategy), strategy)]
    least = min(predict(profiles.of(s), s, cluster).step_seconds for s in tried)
    fastest = search(workload, cluster, 4, Constraints(), profiles).plan.fastest
    assert fastest is not None
    assert fastest.prediction.step_seconds <= 1.001 * least
    best = search(workload, cluster, 4, Constraints.parse(forbid=["tp"]), profiles).plan.best
    assert best is not None
    assert best.strategy.outermost == "pp"
    assert best.strategy.replicas > 1
    within = search(workload, cluster, 4, Constraints.parse(forbid=["outermost", "tp"]), profiles).plan.best
    assert within is not None
    assert within.prediction.step_seconds > 1.1 * best.prediction.step_seconds
    asked = search(workload, cluster, 4, Constraints.parse(fix=["outermost=pp"]), profiles).plan
    assert {candidate.strategy.outermost for candidate in asked.candidates} == {"pp"}


def test_a_slower_device_gets_a_smaller_share(large: ScaledProfiles) -> None:
    workload, profiles = large.traced.workload, large
    cluster = two_kinds(3.0)
    plan = search(workload, cluster, 2, Constraints.parse(forbid=["tp", "pp"]), profiles).plan
    assert plan.best is not None
    fast, slow = plan.best.strategy.parts
    assert fast > slow
    alike = plan.best.strategy.with_(shares="")
    equal = predict(profiles.of(alike), alike, cluster)
    others = [alike.with_(shares=f"{number}:{12 - number}") for number in range(1, 12)]
    least = min(predict_shares(profiles.of, other, cluster, 12).step_seconds for other in others)
    assert plan.best.prediction.step_seconds == pytest.approx(least, rel=0.001)  # within that the simpler one is taken
    assert plan.best.prediction.step_seconds < 0.75 * equal.step_seconds
    assert plan.best.prediction.samples == 12
    assert plan.best.prediction.model_flops == pytest.approx(equal.model_flops)
    forbidden = search(workload, cluster, 2, Constraints.parse(forbid=["tp", "pp", "shares"]), profiles).plan
    assert all(not candidate.strategy.shares for candidate in forbidden.candidates)


def test_a_slower_device_gets_smaller_stages() -> None:
    workload = load_workload(
        "gpt:layers=8,hidden=1024,heads=16,vocabulary=512,sequence=512,batch_size=16,precision=bf16"
    )
    profiles, cluster = ScaledProfiles(Profiles(workload)), two_kinds(3.0)
    best = search(workload, cluster, 2, Constraints.parse(fix=["pp=2"]), profiles).plan.best
    assert best is not None
    first, second = best.strategy.speeds
    assert first > second
    alike = best.strategy.with_(speeds="")
    equal = predict(profiles.of(alike), alike, cluster)
    assert best.prediction.step_seconds < 0.75 * equal.step_seconds
    played = timeline(profiles.traced.of(best.strategy), best.strategy, cluster).prediction
    assert best.prediction.step_seconds == pytest.approx(played.step_seconds, rel=0.05)


def test_equal_devices_get_equal_shares(large: ScaledProfiles) -> None:
    plan = search(large.traced.workload, two_kinds(1.0), 2, Constraints.parse(forbid=["tp", "pp"]), large).plan
    assert all(not candidate.strategy.shares for candidate in plan.candidates)
