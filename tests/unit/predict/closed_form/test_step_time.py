"""Who holds what, what is sent, what is kept and how long it takes, computed by hand for a chain of four links."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from shardwise.cluster.cluster import Cluster, CollectiveCurve, Device, Level, Nodes, Sample
from shardwise.collective import Collective, Group
from shardwise.errors import StrategyError
from shardwise.options import FULL, NONE, Recompute
from shardwise.predict.closed_form.step_time import Costs, costs_of, predict
from shardwise.predict.hardware.network import collective_seconds
from shardwise.predict.profile.kernel import Kernel
from shardwise.predict.profile.profile import Exchanged, Layer, LayerPass, Parameter, Profile, Segment, Update, Value
from shardwise.predict.workers.buckets import Bucket, Gathered
from shardwise.predict.workers.groups import group_of, message_group
from shardwise.predict.workers.holdings import Parts, parts_of
from shardwise.predict.workers.small_kernels import step_kernels
from shardwise.predict.workers.step_program import StepProgram
from shardwise.predict.workers.traffic import communicated
from shardwise.splitting.balance import divided
from shardwise.strategy import Strategy

KIB = 2**10
DEVICE = Device(
    name="accelerator",
    kind="gpu",
    flops={"float32": 1e12, "bf16": 2e12},
    memory_bytes=2**30,
    memory_bandwidth=1e9,
    cores=1,
    launch_seconds=1e-6,
)
CLUSTER = Cluster(
    name="sixteen",
    nodes=(Nodes(DEVICE, 8, 2),),
    levels=(
        Level(name="bus", span=8, bandwidth=1e9, latency=1e-5),
        Level(name="net", span=16, bandwidth=1e8, latency=1e-4),
    ),
)


def moving(size: float) -> Kernel:
    return Kernel("move", "memory", "float32", 0.0, size, (1,))


def layer(size: float = 1e6, **others: Any) -> Layer:
    return Layer(
        forward=LayerPass((moving(size),)), backward=LayerPass((moving(size), moving(size))), inside=100, **others
    )


LAYERS = (layer(), layer(), layer(), layer())
PARAMETERS = (
    Parameter("a", (10, 64), 4, (0,)),  # 2,560 bytes
    Parameter("b", (7, 4), 4, (1,)),  # 112
    Parameter("scale", (), 4, (1,)),  # 4
    Parameter("tied", (16, 4), 4, (0, 3)),  # 256
    Parameter("running", (8,), 4, (2,), trained=False, buffer=True),  # 32
    Parameter("c", (5, 2), 4, (2,)),  # 40
)
VALUES = (
    Value(1000, 1000, 0, (1,), saved=(1,)),
    Value(500, 500, 0, (3,), saved=(3,)),  # goes past links 1 and 2
    Value(2000, 2000, 1, (2,)),
    Value(3000, 3000, 2, (3,), grad=False),
)


def profile(**others: Any) -> Profile:
    given = {
        "name": "chain",
        "tp": 1,
        "sp": 0,
        "microbatch": 1,
        "precision": "float32",
        "device": "gpu",
        "batch_size": 8,
        "segments": (Segment(LAYERS[0]), Segment(LAYERS[1], 1500), Segment(LAYERS[2], 2500), Segment(LAYERS[3], 3500)),
        "parameters": PARAMETERS,
        "values": VALUES,
        "ready": (3, 5, 2, 1, 0),
        "blocks": ((0,), (1, 2), (5,)),
        "update": Update((moving(12.0),), 8.0, together=True),
    }
    return Profile(**{**given, **others})


def parts(strategy: str, **others: Any) -> Parts:
    found = profile(**others)
    return parts_of(found, Strategy.parse(strategy), (1.0, 1.0, 1.0, 1.0))


def costs(strategy: str, **others: Any) -> Costs:
    return costs_of(profile(**others), Strategy.parse(strategy), CLUSTER)


# ---- who holds what -------------------------------------------------------------------------------------------------


def test_groups_of_ranks() -> None:
    """Ranks are numbered with tp fastest, then pp, then fsdp, then dp."""
    strategy = Strategy.parse("dp=2,fsdp=2,pp=2,tp=2")
    assert group_of(strategy, "tp", 1) == Group(2, 1, 2)
    assert group_of(strategy, "pp") == Group(2, 2)
    assert group_of(strategy, "fsdp", 1) == Group(2, 4, 2)
    assert group_of(strategy, "dp") == Group(2, 8)
    assert group_of(strategy, "replicas") == Group(4, 4)
    assert group_of(strategy, "world") == Group(16)
    assert message_group(strategy, 1, 0) == Group(2, 2, 0)


def test_buckets_of_a_module_are_those_of_ddp() -> None:
    """In the order in which gradients are complete: the first one closes at 1 MiB, others at 25 MiB."""
    large = tuple(Parameter(f"w{n}", (KIB, KIB), 4, (n,)) for n in range(4))  # 4 MiB each
    small = tuple(Parameter(f"v{n}", (256, KIB), 4, (n,)) for n in range(4))  # 1 MiB each
    (worker,) = parts("dp=2", parameters=(*large, *small), ready=(7, 3, 6, 2, 5, 1, 4, 0)).workers
    assert worker.stages[0].buckets == (Bucket(2**20, 3), Bucket(19 * 2**20, 0))


def test_buckets_of_a_stage() -> None:
    stages = parts("dp=2,pp=2,microbatches=4").stages
    # "tied" is on both workers, "running" is no parameter
    assert [stage.buckets for stage in stages.values()] == [(Bucket(2560 + 112 + 4 + 256, 0),), (Bucket(256 + 40, 2),)]


def test_sharded_groups_are_padded_to_whole_rows() -> None:
    (worker,) = parts("fsdp=4").workers
    (stage,) = worker.stages
    # rows of 256 bytes: 10 become 12; of 16: 7 become 8; of 8: 5 become 8; "tied", 16 rows of 16, is the rest
    assert [block.gathered for block in stage.blocks] == [
        Gathered(12 * 256, 12 * 256, 2560),
        Gathered(8 * 16, 8 * 16, 112),
        Gathered(8 * 8, 8 * 8, 40),
    ]
    assert stage.root == Gathered(256, 256, 256)
    assert stage.buckets == (Bucket(4, 0),)  # a scalar is not sharded
    assert worker.parameters == 3 * 256 + 2 * 16 + 4 + 4 * 16 + 32 + 2 * 8
    assert worker.updated == (3 * 64 + 2 * 4 + 1 + 4 * 4 + 2 * 2, 5)


def test_zero_1_deals_whole_parameters() -> None:
    (worker,) = parts("fsdp=2,zero=1").workers
    # 640 elements to one replica; 64, 28, 10 and 1 to the other
    assert worker.updated == (640, 1)
    assert sorted(worker.broadcast) == [4 * (64 + 28 + 10 + 1), 2560]
    assert worker.parameters == sum(parameter.bytes for parameter in PARAMETERS)


def test_messages_go_to_who_uses_a_value() -> None:
    stages = parts("pp=4,microbatches=4").stages
    assert stages[0].sent == ((1, (1000,)), (3, (500,)))
    assert stages[3].returned == ((0, (500,)),)  # none for the value without a gradient
    assert [stage.received for stage in stages.values()] == [0, 1000, 2000, 3500]
    # kept: 100 inside each; what is kept of what arrived; outputs until their gradients come
    assert [stage.saved for stage in stages.values()] == [
        100 + 1000 + 500,
        100 + 1000 + 2000,
        100 + 2000 + 3000,
        100 + 500 + 3000,
    ]


def test_a_parameter_of_two_workers_is_summed_over_them() -> None:
    first, second = parts("pp=2,microbatches=4").workers
    assert first.tied == second.tied == (((0, 1), 256),)


def test_a_parameter_of_two_stages_of_one_worker() -> None:
    one, two = (
        parts("dp=2,pp=1,tp=2", tp=2).workers,
        parts("dp=2,pp=2,stages=2,schedule=interleaved,microbatches=4").workers,
    )
    assert not one[0].twice
    # stages 0 and 2 are on worker 0, stages 1 and 3 on worker 1: "tied" is used by links 0 and 3
    assert two[0].tied == (((0, 1), 256),)
    with pytest.raises(StrategyError, match="tied is used in several stages of one worker"):
        parts(
            "fsdp=2,pp=2,stages=2,schedule=interleaved,microbatches=4",
            parameters=(replace(PARAMETERS[3], segments=(0, 2)),),
            ready=(0,),
            blocks=(),
        )


def test_stages_are_cut_by_cost_unless_messages_differ() -> None:
    costs, even = [1.0, 1.0, 1.0, 1.0], [10**9, 10**9, 10**9]
    assert divided(costs, even, 2, "cpu", in_blocks=False) == [[0], [2]]
    assert divided(costs, [10**9, 4 * 10**9, 10**9], 2, "cpu", in_blocks=False) == [[0], [1]]  # 3 s at 1 GB/s more
    assert divided(costs, [10**9, 4 * 10**9, 10**9], 2, "gpu", in_blocks=False) == [[0], [2]]  # 0.12 s at 25 GB/s


# ---- what is sent ---------------------------------------------------------------------------------------------------


def test_communicated_by_a_sharded_worker() -> None:
    found = profile()
    strategy = Strategy.parse("dp=2,fsdp=2,microbatches=2")
    sent = communicated(StepProgram(found, parts_of(found, strategy, (1.0,) * 4)))
    gathered = 10 * 256 + 8 * 16 + 6 * 8
    root = 256
    assert sent["all_gather", "fsdp", "forward"] == (2 * 4, 2 * (gathered + root))
    assert sent["all_gather", "fsdp", "backward"] == (2 * 3, 2 * gathered)  # the rest stays until the pass is over
    assert sent["reduce_scatter", "fsdp", "backward"] == (2 * 4, 2 * (gathered + root))
    assert sent["all_reduce", "dp", "backward"] == (2 * 4 + 1, (gathered + root) + 4)  # half of it; and the scalar
    assert sent["all_reduce", "world", "report"] == (1, 24)


def test_communicated_by_a_stage() -> None:
    exchanges = LayerPass((moving(1e6),), (Exchanged("all_reduce", 4096),))
    segments = tuple(Segment(replace(LAYERS[0], forward=exchanges), 1000 * n) for n in range(4))
    found = profile(tp=2, segments=segments)
    strategy = Strategy.parse("tp=2,pp=4,microbatches=3")
    sent = communicated(StepProgram(found, parts_of(found, strategy, (1.0,) * 4)), pipeline_rank=1)
    assert sent["all_reduce", "tp", "forward"] == (3, 3 * 4096)
    assert sent["recv", "pp", "forward"] == (3, 3 * 1000)
    assert sent["send", "pp", "forward"] == (3, 3 * 2000)
    assert sent["recv", "pp", "backward"] == (3, 3 * 2000)
    assert sent["send", "pp", "backward"] == (3, 3 * 1000)


# ---- how long it takes ----------------------------------------------------------------------------------------------


def seconds_of(size: float) -> float:
    return costs("single,microbatches=8").times.launched(moving(size)).total


def small(count: int) -> float:
    """Return the seconds of so many kernels on a few numbers."""
    return costs("single,microbatches=8").calls.small(count).total


def collective(operation: str, size: int, group: Group) -> float:
    return collective_seconds(Collective(operation, size, group), CLUSTER)


def test_one_worker() -> None:
    found = predict(profile(), Strategy(microbatches=8), CLUSTER)
    a_pass = 4 * seconds_of(1e6)
    accumulated = costs("single,microbatches=8").calls.moved(
        10 * 64 + 28 + 1 + 64 + 10, 3 * (2560 + 112 + 4 + 256 + 40), 5
    )
    assert found.compute_seconds == pytest.approx(8 * 3 * a_pass + 7 * accumulated.total + 8 * small(3))
    update = seconds_of(12.0 * (640 + 28 + 1 + 64 + 10))
    assert found.optimizer_seconds == pytest.approx(update + small(step_kernels(profile(), Strategy(microbatches=8))))
    assert found.step_seconds == pytest.approx(found.compute_seconds + found.optimizer_seconds)
    waiting = found.exposed_communication_seconds + found.bubble_seconds + found.host_seconds
    assert waiting == pytest.approx(0.0, abs=1e-12)


def test_replicas_wait_for_the_last_bucket() -> None:
    found = predict(profile(), Strategy(dp=8), CLUSTER)
    bucket = collective("all_reduce", 2560 + 112 + 4 + 256 + 40, Group(8))
    report = collective("all_reduce", 24, Group(8))
    assert found.communication_seconds == pytest.approx(bucket + report)
    hidden = min(report, found.optimizer_seconds)  # it runs beside the update
    assert found.exposed_communication_seconds == pytest.approx(bucket + report - hidden)


def test_two_stages() -> None:
    """F0 F1 B0 B1 on each of two equal workers: m (f + b) + f + b and messages there and back."""
    strategy = Strategy(pp=2, microbatches=8)
    found = predict(profile(update=Update(), clipped=False), strategy, CLUSTER)
    one = costs("pp=2,microbatches=8")
    f = 2 * seconds_of(1e6) + small(5) / 2
    there = sum(one.calls.sent(size, Group(2)) for size in (500, 2000))
    assert one.stages.waits("F", 1) == one.stages.waits("B", 0) == pytest.approx(there)
    messages = 2 * there
    assert found.step_seconds == pytest.approx(9 * 3 * f + messages, rel=0.02)
    assert found.bubble_seconds == pytest.approx(3 * f + messages, rel=0.1)


@pytest.mark.parametrize(
    ("strategy", "between", "seconds"),
    [
        ("pp=4", (1, 2), 10.0),  # the only one of this pipeline that crosses the hosts
        ("pp=4", (0, 1), 2.0),  # beside others of this host
        ("dp=2,pp=2,outermost=pp", (0, 1), 20.0),  # one of each replica
        ("dp=2,pp=2", (0, 1), 2.0),
    ],
)
def test_only_messages_that_cross_hosts_share_what_is_between_them(
    strategy: str, between: tuple[int, int], seconds: float
) -> None:
    def measured(nodes: int, groups: int, seconds: float) -> CollectiveCurve:
        return CollectiveCurve("send", 2, nodes, (Sample((1000,), seconds),), groups)

    curves = measured(1, 1, 1.0), measured(1, 2, 2.0), measured(2, 1, 10.0), measured(2, 2, 20.0)
    two_hosts = replace(CLUSTER, nodes=(Nodes(DEVICE, 2, 2),), collectives=curves)
    parsed = Strategy.parse(strategy)
    found = costs_of(profile(), parsed, two_hosts)
    assert found.calls.sent(1000, message_group(parsed, *between)) == pytest.approx(seconds)


def test_recompute_adds_a_forward_pass_up_to_what_is_needed() -> None:
    plain = predict(profile(), Strategy(microbatches=8), CLUSTER)
    again = predict(profile(), Strategy(microbatches=8, recompute=FULL), CLUSTER)
    # blocks are links 0 (with "tied" 0 to 3), 1 and 2: the last link of a block is computed as far as it says
    recomputed = again.compute_seconds - plain.compute_seconds
    assert recomputed == pytest.approx(0.0)  # these layers keep nothing of what comes after their inputs
    whole = tuple(
        Segment(replace(each.layer, recomputed=each.layer.forward), each.message) for each in profile().segments
    )
    some = predict(profile(segments=whole), Strategy(microbatches=8, recompute=FULL), CLUSTER)
    assert some.compute_seconds - plain.compute_seconds == pytest.approx(8 * 3 * seconds_of(1e6))


def test_a_part_of_the_blocks_is_computed_again() -> None:
    whole = tuple(
        Segment(replace(each.layer, recomputed=each.layer.forward, inside=10_000), 1500) for each in profile().segments
    )
    found = [
        predict(profile(segments=whole * 2), Strategy(pp=2, microbatches=8, recompute=again), CLUSTER)
        for again in (NONE, Recompute(1, 2), FULL)
    ]
    none, half, full = (each.compute_seconds for each in found)
    assert half - none == pytest.approx(8 * 2 * seconds_of(1e6))  # a stage has two blocks of two segments
    # all four of the first stage, and of the last one those before the loss, which is slowest without
    assert full - none == pytest.approx(8 * 4 * seconds_of(1e6), rel=0.01)
    none, half, full = (each.memory.activations for each in found)
    assert none > half > full


def test_a_module_that_could_not_be_traced_is_computed_again_once() -> None:
    layer = replace(LAYERS[1], recomputed=LAYERS[1].forward, saves=True)
    alone = {
        "segments": (Segment(layer),),
        "parameters": tuple(replace(each, segments=(0,)) for each in PARAMETERS),
        "values": (),
        "cut": False,
    }
    plain, again = (predict(profile(**alone), Strategy(microbatches=8, recompute=r), CLUSTER) for r in (NONE, FULL))
    assert again.compute_seconds - plain.compute_seconds == pytest.approx(8 * seconds_of(1e6))


def test_a_host_that_cannot_keep_up() -> None:
    slow = replace(CLUSTER, nodes=(Nodes(replace(DEVICE, launch_seconds=1.0), 8, 2),))
    found = predict(profile(), Strategy(microbatches=8), slow)
    launched = 8 * 12 + 7 * 5 + 8 * 3  # passes, gradients added to earlier ones, scaling of losses
    assert found.step_seconds == pytest.approx(launched * 1.0 + found.optimizer_seconds)
    assert found.host_seconds == pytest.approx(launched * 1.0 - found.compute_seconds)


# ---- what is kept ---------------------------------------------------------------------------------------------------


def keeping(inside: int) -> tuple[Segment, ...]:
    return tuple(Segment(replace(each.layer, inside=inside), each.message) for each in profile().segments)


def test_memory_of_one_worker() -> None:
    memory = costs("single,microbatches=8", segments=keeping(10_000)).memory
    trained = 2560 + 112 + 4 + 256 + 40
    assert memory.parameters == trained + 32
    assert memory.gradients == trained
    assert memory.optimizer == 8 * trained // 4
    # the peak is where the backward pass begins: what each link keeps, and the two values that are kept
    assert memory.activations == 4 * 10_000 + 1000 + 500
    # with little to keep it is in the update, which copies all parameters for a moment
    update = Update((moving(12.0),), 8.0, temporary_bytes=4.0)
    assert costs("single,microbatches=8", update=update).memory.temporary == trained
    # one after the other on a host: the largest one
    hosts = replace(CLUSTER, nodes=tuple(replace(n, device=replace(n.device, kind="cpu")) for n in CLUSTER.nodes))
    one = Strategy.parse("single,microbatches=8")
    assert costs_of(profile(update=update, device="cpu"), one, hosts).memory.temporary == 2560


def test_memory_of_a_pipeline() -> None:
    """1f1b: as many microbatches as stages follow (Narayanan et al. 2021); gpipe: all of them."""
    few, many = (
        costs(f"pp=4,microbatches=8,schedule={schedule}", parameters=PARAMETERS[1:2], ready=(0,), blocks=()).memory
        for schedule in ("1f1b", "gpipe")
    )
    # stage 2 needs most: 100 inside, 2000 that arrived, 3000 that it sent; and what arrives for one more
    assert few.activations == 2 * 5100 + 2000
    assert many.activations == 8 * 5100 + 2000


# ---- what cannot be -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strategy", "others", "message"),
    [
        ("tp=2", {}, "has \\(tp, sp, microbatch, split, compiled, loss_pieces, gathers again\\)"),
        ("single,microbatches=4", {}, "has \\(tp, sp, microbatch, split, compiled, loss_pieces, gathers again\\)"),
        ("single,precision=bf16,microbatches=8", {}, "in float32"),
        ("pp=2,microbatches=8", {"cut": False}, "cannot be traced"),
        ("pp=8,microbatches=8", {}, "can be cut into 4 stages at most"),
        ("dp=3", {}, "does not divide"),
        ("single,microbatches=8", {"device": "cpu"}, "is for a cpu, sixteen has accelerator"),
    ],
)
def test_refusals(strategy: str, others: dict[str, Any], message: str) -> None:
    with pytest.raises(StrategyError, match=message):
        predict(profile(**others), Strategy.parse(strategy), CLUSTER)


# ---- memory that there is -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("workers", "fits"), [(8, True), (16, False)])
def test_devices_that_are_not_used_need_not_have_the_memory(workers: int, fits: bool) -> None:
    large, small = replace(DEVICE, memory_bytes=2**33), replace(DEVICE, memory_bytes=1)
    cluster = replace(CLUSTER, nodes=(Nodes(large, 8, 1), Nodes(small, 8, 1)))
    found = predict(profile(), Strategy(dp=workers, microbatches=1), cluster, workers)
    assert found.memory_usable == pytest.approx(large.memory_bytes if fits else 0, rel=1e-6)
    assert found.fits is fits
