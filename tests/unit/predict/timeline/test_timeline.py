"""Steps played as events: by hand where they are small, against the closed form where they are not."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from hosts import quick

from shardwise.cluster.cluster import Cluster, Nodes
from shardwise.cluster.find import find_cluster
from shardwise.predict.closed_form.segment_times import slowest
from shardwise.predict.closed_form.step_time import costs_of, predict
from shardwise.predict.hardware.constants import constants
from shardwise.predict.prediction import Prediction
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Layer, LayerPass, Parameter, Profile, Segment, Value
from shardwise.predict.profile.profiler import Profiles
from shardwise.predict.timeline.events import COMPUTE, Operation
from shardwise.predict.timeline.timeline import Timeline, timeline
from shardwise.splitting.schedule import BACKWARD, order
from shardwise.strategy import Strategy
from shardwise.workload.load import load_workload

SAMPLES = 2
GRID = [
    "single",
    "dp=4",
    "dp=4,recompute=full",
    "fsdp=4",
    "fsdp=4,zero=2",
    "fsdp=4,zero=1",
    "fsdp=4,recompute=full",
    "fsdp=4,recompute=1/4",
    "dp=2,fsdp=2",
    "tp=2",
    "dp=2,tp=4,sp=1",
    "fsdp=2,tp=2",
    "pp=4",
    "pp=4,schedule=gpipe",
    "pp=4,schedule=interleaved",
    "pp=4,schedule=zero-bubble",
    "pp=4,schedule=pipedream",
    "pp=8,schedule=pipedream,recompute=full",
    "tp=2,pp=4,schedule=pipedream",
    "dp=2,pp=4",
    "dp=2,fsdp=2,pp=2,outermost=pp",
    "fsdp=2,pp=2",
    "fsdp=2,pp=2,zero=2",
    "fsdp=2,pp=2,recompute=1/2",
    "fsdp=2,pp=2,schedule=zero-bubble",
    "tp=2,pp=4",
    "dp=2,tp=2,pp=2",
    "fsdp=2,tp=2,pp=2,schedule=interleaved",
]
CLUSTERS = ["h100x8", "a100x16", "l4x8", "epyc-7763x8"]
RECIPES = {
    "gpt": ("gpt:layers=8,hidden=256,heads=4,sequence=128,vocabulary=512,batch_size=32", {}),
    "image": ("image", {"batch_size": 32}),
    "medical": ("medical", {"batch_size": 16}),
}


@pytest.fixture(scope="module")
def profiles() -> dict[tuple[str, str], Profiles]:
    return {
        (name, device): Profiles(load_workload(*RECIPES[name]), device) for name in RECIPES for device in ("gpu", "cpu")
    }


def settled(text: str, batch_size: int) -> Strategy:
    strategy = Strategy.parse(text)
    return strategy.with_(microbatches=batch_size // strategy.replicas // SAMPLES)


def parts(prediction: Prediction) -> float:
    return (
        prediction.compute_seconds
        + prediction.exposed_communication_seconds
        + prediction.bubble_seconds
        + prediction.optimizer_seconds
        + prediction.host_seconds
    )


def played(profiles: Profiles, text: str, cluster: Cluster) -> tuple[Timeline, Prediction]:
    strategy = settled(text, profiles.workload.batch_size)
    profile = profiles.of(strategy)
    return timeline(profile, strategy, cluster), predict(profile, strategy, cluster)


@pytest.mark.parametrize("cluster", CLUSTERS)
@pytest.mark.parametrize("text", GRID)
def test_closed_form_of_a_gpt(profiles: dict[tuple[str, str], Profiles], text: str, cluster: str) -> None:
    machines = quick(cluster)
    device = slowest(machines, "float32").kind
    precise = text if device == "gpu" else f"{text},precision=float32"
    step, closed = played(profiles["gpt", device], precise, machines)
    assert closed.step_seconds == pytest.approx(step.prediction.step_seconds, rel=0.05)
    assert closed.compute_seconds == pytest.approx(step.prediction.compute_seconds, rel=0.05)
    assert parts(step.prediction) == pytest.approx(step.prediction.step_seconds, rel=1e-9)
    assert closed.memory == step.prediction.memory


@pytest.mark.parametrize("text", GRID)
def test_closed_form_where_hosts_are_slow(profiles: dict[tuple[str, str], Profiles], text: str) -> None:
    step, closed = played(profiles["gpt", "gpu"], text, find_cluster("h100x8"))
    assert closed.step_seconds == pytest.approx(step.prediction.step_seconds, rel=0.05)
    assert parts(step.prediction) == pytest.approx(step.prediction.step_seconds, rel=1e-9)


@pytest.mark.parametrize("slower", [10, 1000])
@pytest.mark.parametrize(
    "text",
    [
        "dp=2,pp=2,schedule=interleaved",
        "dp=2,pp=2",
        "dp=2,pp=2,schedule=zero-bubble",
        "pp=4,schedule=pipedream",
    ],
)
def test_closed_form_over_slow_links(profiles: dict[tuple[str, str], Profiles], text: str, slower: int) -> None:
    """There buckets of one stage are still under way when those of the next one are complete."""
    machines = find_cluster("h100x8")
    levels = tuple(replace(level, bandwidth=level.bandwidth / slower) for level in machines.levels)
    step, closed = played(profiles["gpt", "gpu"], text, replace(machines, levels=levels))
    assert closed.step_seconds == pytest.approx(step.prediction.step_seconds, rel=0.05)
    assert parts(closed) == pytest.approx(closed.step_seconds, rel=0.05)


@pytest.mark.parametrize("cluster", ["h100x8", "epyc-7763x8"])
@pytest.mark.parametrize("text", ["dp=4", "fsdp=4", "tp=2", "pp=4", "dp=2,pp=2", "fsdp=2,pp=2", "dp=2,tp=2,pp=2"])
@pytest.mark.parametrize("recipe", ["image", "medical"])
def test_closed_form_of_recipes(
    profiles: dict[tuple[str, str], Profiles], recipe: str, text: str, cluster: str
) -> None:
    machines = find_cluster(cluster)
    step, closed = played(profiles[recipe, slowest(machines, "float32").kind], text, machines)
    assert closed.step_seconds == pytest.approx(step.prediction.step_seconds, rel=0.05)
    assert parts(step.prediction) == pytest.approx(step.prediction.step_seconds, rel=1e-9)


# ---- what is played -------------------------------------------------------------------------------------------------


def computed(step: Timeline, worker: int) -> list[Operation]:
    return [o for o in step.operations if o.worker == worker and o.stream == COMPUTE and o.kind in PASSES]


PASSES = ("forward", "backward", "backward of inputs", "backward of weights")


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "interleaved", "zero-bubble"])
def test_the_table_of_the_runner(profiles: dict[tuple[str, str], Profiles], schedule: str) -> None:
    step, _ = played(profiles["gpt", "gpu"], f"pp=4,schedule={schedule}", find_cluster("h100x8"))
    for worker in range(4):
        stages = 2 if schedule == "interleaved" else 1
        table = order(schedule, worker, 4, stages, 16)
        assert [operation.name for operation in computed(step, worker)] == [str(action) for action in table]


def test_buckets_leave_while_it_computes(profiles: dict[tuple[str, str], Profiles]) -> None:
    step, _ = played(profiles["gpt", "gpu"], "dp=4", find_cluster("l4x8"))
    buckets = [operation for operation in step.operations if operation.stream == "dp"]
    backward = [o for o in computed(step, 0) if o.name.startswith("0B3")]
    assert len(buckets) > 1
    assert buckets[0].start < backward[-1].end
    assert all(a.end <= b.start for a, b in pairwise(buckets))
    update = next(operation for operation in step.operations if operation.kind == "optimizer")
    assert update.start >= buckets[-1].end


def test_gathers_run_one_block_ahead(profiles: dict[tuple[str, str], Profiles]) -> None:
    step, _ = played(profiles["gpt", "gpu"], "fsdp=4", quick("l4x8"))
    gathers = {o.name: o for o in step.operations if o.name.startswith("gather block") and o.name.endswith("of 0F1")}
    blocks = {o.name: o for o in computed(step, 0) if o.name.startswith("0F1 block")}
    assert len(gathers) == len(blocks) == 8
    for number in range(2, 8):
        gather, before = gathers[f"gather block {number} of 0F1"], blocks[f"0F1 block {number - 1}"]
        assert gather.start >= blocks[f"0F1 block {number - 2}"].end
        assert gather.start < before.end
        assert blocks[f"0F1 block {number}"].start >= gather.end


# ---- by hand --------------------------------------------------------------------------------------------------------


def chain(segments: int, seconds: float, cluster: Cluster) -> Profile:
    """Equal links of so many seconds forwards and twice as many backwards."""
    device = cluster.device(0)
    share = constants().memory_share
    kernel = Kernel("move", "memory", "float32", 0.0, seconds * device.memory_bandwidth * share, (1,))
    layer = Layer(forward=LayerPass((kernel,)), backward=LayerPass((kernel, kernel)))
    return Profile(
        name="chain",
        tp=1,
        sp=0,
        microbatch=1,
        precision="float32",
        device="gpu",
        batch_size=8,
        segments=(Segment(layer), *(Segment(layer, 4) for _ in range(segments - 1))),
        parameters=tuple(Parameter(f"w{n}", (256, 1024), 4, (n,)) for n in range(segments)),
        values=tuple(Value(4, 4, n, (n + 1,)) for n in range(segments - 1)),
        ready=tuple(reversed(range(segments))),
    )


def test_one_worker_by_hand() -> None:
    cluster = find_cluster("h100x8")
    strategy = Strategy(microbatches=8)
    step = timeline(chain(4, 0.01, cluster), strategy, cluster).prediction
    assert step.compute_seconds == pytest.approx(8 * 4 * 0.03, rel=0.01)
    assert step.exposed_communication_seconds == step.bubble_seconds == 0.0
    assert step.host_seconds == pytest.approx(0.0, abs=1e-4)


def test_pipeline_bubble_by_hand() -> None:
    """(p - 1) (f + b) beside m (f + b): 3 of 11 (Narayanan et al. 2019)."""
    cluster = find_cluster("h100x8")
    strategy = Strategy(pp=4, microbatches=8)
    step = timeline(chain(4, 0.01, cluster), strategy, cluster).prediction
    assert step.step_seconds == pytest.approx(11 * 0.03, rel=0.01)
    assert step.bubble_seconds == pytest.approx(3 * 0.03, rel=0.02)


def test_gradients_that_cannot_hide_by_hand() -> None:
    """The last bucket is complete when the backward pass is: it is seen, the others are not."""
    cluster = quick("h100x8")
    device = replace(cluster.device(0), origins={"overlap": "measured"})  # at full speed beside communication
    cluster = replace(cluster, nodes=(replace(cluster.nodes[0], device=device),))
    profile = chain(4, 0.01, cluster)
    strategy = Strategy(dp=8, microbatches=1)
    costs = costs_of(profile, strategy, cluster)
    (stage,) = costs.parts.stages.values()
    step = timeline(profile, strategy, cluster)
    pieces = costs.stages.pieces(stage, BACKWARD, None, True, costs.stages.spent(stage, BACKWARD))
    buckets = [sum(piece.reductions) for piece in pieces if piece.reductions]
    assert [bucket.bytes for bucket in stage.buckets] == [2**20, 3 * 2**20]  # the first one is small (DDP)
    finish = costs.finish(costs.parts.workers[0])
    communication = sum(buckets) + finish.report
    assert step.prediction.communication_seconds == pytest.approx(communication)
    seen = buckets[-1] + finish.report - finish.update  # the report runs beside the update
    assert step.prediction.exposed_communication_seconds == pytest.approx(seen, rel=0.01)


# ---- stragglers -----------------------------------------------------------------------------------------------------


def test_everybody_waits_for_a_slow_rank(profiles: dict[tuple[str, str], Profiles]) -> None:
    cluster = find_cluster("l4x8")
    strategy = settled("dp=4,tp=2", 32)
    profile = profiles["gpt", "gpu"].of(strategy)
    usual = timeline(profile, strategy, cluster).prediction
    slow = timeline(profile, strategy, cluster, slowed={5: 3.0})
    assert slow.ranks == (0, 4)  # one for all the others, and the pair of ranks with the slow one
    assert slow.names[1].endswith("3 times as slow")
    assert slow.prediction.compute_seconds == pytest.approx(3 * usual.compute_seconds, rel=0.05)
    updates = [operation.start for operation in slow.operations if operation.kind == "optimizer"]
    assert updates[0] == pytest.approx(updates[1])  # when both know the norm of the gradient


def test_a_slow_stage_holds_the_pipeline_up(profiles: dict[tuple[str, str], Profiles]) -> None:
    cluster = find_cluster("h100x8")
    strategy = settled("pp=4", 32)
    profile = profiles["gpt", "gpu"].of(strategy)
    usual = timeline(profile, strategy, cluster).prediction
    slow = timeline(profile, strategy, cluster, slowed={2: 1.5}).prediction
    assert 1.2 < slow.step_seconds / usual.step_seconds < 1.5


def test_two_kinds_of_nodes(profiles: dict[tuple[str, str], Profiles]) -> None:
    fast, slow = find_cluster("h100x16"), find_cluster("a100x16")
    mixed = replace(slow, name="mixed", nodes=(Nodes(fast.nodes[0].device, 8, 1), Nodes(slow.nodes[0].device, 8, 1)))
    strategy = settled("dp=16", 32)
    profile = profiles["gpt", "gpu"].of(strategy)
    seconds = {c.name: timeline(profile, strategy, c) for c in (fast, slow, mixed)}
    assert seconds["mixed"].ranks == (0, 8)
    assert seconds["mixed"].prediction.step_seconds == pytest.approx(
        seconds[slow.name].prediction.step_seconds, rel=0.01
    )
    assert seconds[fast.name].prediction.step_seconds < seconds["mixed"].prediction.step_seconds


def test_what_hosts_need_beside_kernels_adds_up(profiles: dict[tuple[str, str], Profiles]) -> None:
    """On a CPU: once a step, for each pass through a stage, each exchange, each gather and scatter."""
    plain = find_cluster("epyc-7763x2")

    def with_overheads(overheads: dict[str, float]) -> Cluster:
        nodes = tuple(replace(each, device=replace(each.device, overheads=overheads)) for each in plain.nodes)
        return replace(plain, nodes=nodes)

    counted = {
        ("dp=2", "step"): 1,
        ("pp=2", "step"): 1,
        ("pp=2", "stage"): 32,  # forwards and backwards, of sixteen microbatches
        ("fsdp=2", "sharded"): 8 * (5 + 4 + 5),  # gathers of four blocks and the root, again of the blocks; scatters
        ("dp=2", "exchange"): 0,
    }
    for (text, name), times in counted.items():
        strategy = settled(text, 32)
        profile = profiles["image", "cpu"].of(strategy)
        for predicted in (predict, lambda *given: timeline(*given).prediction):
            without = predicted(profile, strategy, plain)
            found = predicted(profile, strategy, with_overheads({name: 0.01}))
            assert found.host_seconds - without.host_seconds == pytest.approx(0.01 * times, rel=0.01, abs=1e-6), (
                text,
                name,
                predicted,
            )
            if text != "pp=2":  # where others wait meanwhile
                assert found.step_seconds - without.step_seconds == pytest.approx(0.01 * times, rel=0.01, abs=1e-6)


def test_a_slow_stage_sets_the_pace_of_a_pipeline_without_an_end(profiles: dict[tuple[str, str], Profiles]) -> None:
    cluster = quick("h100x8")
    strategy = settled("pp=4,schedule=pipedream", 32)
    profile = profiles["gpt", "gpu"].of(strategy)
    usual, slow = (timeline(profile, strategy, cluster, slowed=each).prediction for each in ({}, {2: 3.0}))
    assert slow.step_seconds == pytest.approx(3 * usual.step_seconds, rel=0.2)
    assert slow.compute_seconds + slow.optimizer_seconds > 0.9 * slow.step_seconds, "it never waits"
