"""Seconds of the communication of other software, against sums done by hand on a made-up cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest
from round_numbers import CLUSTER, NUMBERS, SIZES, H, L, S, costs

from shardwise.collective import Collective, Group
from shardwise.predict.closed_form.step_time import Costs
from shardwise.predict.hardware.network import collective_seconds
from shardwise.predict.workers.passes import Sync
from shardwise.splitting.schedule import BACKWARD, FORWARD

pytestmark = pytest.mark.usefixtures("round_numbers")

EACH = 2 * (7 / 8) * 2 * S * H / 100e9
"""Seconds to all-reduce 2 x 2048 x 4096 bytes of activations among eight ranks: 7/8 of them twice over 100 GB/s."""

MESSAGE = 2 * S * H / 10e9
"""Seconds to send as many between nodes."""


def in_block(found: Costs) -> tuple[float, float]:
    """Return the seconds of a block's exchanges, forward and backward."""
    times = found.times
    return times.forward.between(1, 2).exchanges, times.backward.between(1, 2).exchanges


def test_all_reduces_of_tensor_parallelism() -> None:
    assert in_block(costs("tp=8")) == pytest.approx((2 * EACH, 2 * EACH), rel=1e-6)
    assert in_block(costs("tp=8", micro_batch=3)) == pytest.approx((6 * EACH, 6 * EACH), rel=1e-6)
    assert in_block(costs("dp=8")) == (0, 0)


def test_single_precision_exchanges_twice_as_much() -> None:
    assert in_block(costs("tp=8", dtype="float32")) == pytest.approx((4 * EACH, 4 * EACH), rel=1e-6)


def test_the_loss_sums_three_floats_of_each_token() -> None:
    times = costs("tp=8").times
    floats = 2 * (7 / 8) * 4 * S / 100e9
    assert times.forward.between(L + 1, L + 2).exchanges == pytest.approx(3 * floats, rel=1e-6)
    assert times.backward.between(L + 1, L + 2).exchanges == pytest.approx(EACH, rel=1e-6)


def test_backward_all_reduces_hide_behind_gradients_of_weights() -> None:
    # beside them a quarter of their time is lost
    assert in_block(costs("tp=8", async_tensor=True)) == pytest.approx((2 * EACH, 0.25 * 2 * EACH), rel=1e-6)
    again = costs("tp=8,recompute=full", async_tensor=True)
    assert in_block(again)[1] == pytest.approx(0.25 * 2 * EACH, rel=1e-6)
    assert again.times.again(1, 2).exchanges == pytest.approx(2 * EACH, rel=1e-6)


def test_products_that_are_cut_hide_all_exchanges() -> None:
    hidden = costs("tp=8", overlap_tensor=True, async_tensor=True)
    assert in_block(hidden) == pytest.approx((0.25 * 2 * EACH, 0.25 * 2 * EACH), rel=1e-6)


def test_sequence_parallelism_moves_as_much_in_two_halves() -> None:
    # and gathers the inputs of two products once more in the backward pass, while it computes
    forward, backward = in_block(costs("tp=8,sp=1"))
    assert forward == pytest.approx(2 * EACH, rel=1e-6)
    assert backward == pytest.approx((2 + 0.25 * 2 / 2) * EACH, rel=1e-6)
    exchanges = costs("tp=8,sp=1").profile.segments[1].layer.forward.exchanges
    assert [each.operation for each in exchanges] == ["reduce_scatter"] * 2 + ["all_gather"] * 2


def test_keys_and_values_go_around_the_ring() -> None:
    # 2 bytes of keys and values of a whole sample over 7/8 of a ring in a node, hidden at a loss of a quarter
    ring = (7 / 8) * 2 * 2 * S * H / 100e9
    assert in_block(costs("dp=8", context=8)) == pytest.approx((0.25 * ring, 0.25 * 2 * ring), rel=1e-6)
    few = replace(SIZES, kv_heads=8)
    assert in_block(costs("dp=8", few, context=8))[0] == pytest.approx(0.25 * ring / 4, rel=1e-6)


def exchanged(found: Costs, stage: int, kind: str) -> float:
    return found.stages.spent(found.parts.stages[stage], kind).exchanges


def test_the_sender_waits_for_messages_between_stages() -> None:
    found = costs("dp=8,pp=4,outermost=pp")
    assert [exchanged(found, stage, FORWARD) for stage in range(4)] == pytest.approx([MESSAGE] * 3 + [0])
    assert [exchanged(found, stage, BACKWARD) for stage in range(4)] == pytest.approx([0] + [MESSAGE] * 3)
    assert found.stages.waits(FORWARD, 1) == found.stages.waits(BACKWARD, 0) == 0


def test_messages_leave_their_sender_free() -> None:
    found = costs("dp=8,pp=4,outermost=pp", overlap_pipeline=True)
    assert [exchanged(found, stage, kind) for stage in range(4) for kind in (FORWARD, BACKWARD)] == [0] * 8
    assert [found.stages.waits(FORWARD, stage) for stage in range(4)] == pytest.approx([0] + [MESSAGE] * 3)
    assert [found.stages.waits(BACKWARD, stage) for stage in range(4)] == pytest.approx([MESSAGE] * 3 + [0])


@pytest.mark.parametrize("spelled", ["tp=8,pp=4", "tp=8,sp=1,pp=4"])
def test_messages_are_split_among_tensor_parallel_ranks(spelled: str) -> None:
    whole = costs("tp=8,pp=4", overlap_pipeline=True)
    parts = costs(spelled, overlap_pipeline=True, scatter_pipeline="sp" not in spelled)
    assert whole.stages.waits(FORWARD, 1) == pytest.approx(MESSAGE)
    assert parts.stages.waits(FORWARD, 1) == pytest.approx(MESSAGE / 8)


def test_what_arrives_in_parts_is_held_whole() -> None:
    """The ranks gather the parts of a message before they compute with it; with sp=1 each holds its part."""
    stage = 1
    whole, parts, sequence = (
        costs(spelled, scatter_pipeline=scattered).parts.stages[stage]
        for spelled, scattered in (("tp=8,pp=4", False), ("tp=8,pp=4", True), ("tp=8,sp=1,pp=4", False))
    )
    assert parts.received == whole.received == 8 * sequence.received
    assert parts.saved == whole.saved


def test_first_and_last_stage_sum_their_embeddings() -> None:
    # 2 bytes of 6,400 rows of 4,096 between two ranks of different nodes: once there and once back
    found = costs("tp=8,pp=4")
    sums = [found.finish(worker).reduce for worker in found.parts.workers]
    assert sums == pytest.approx([2 * 6400 * H / 10e9, 0, 0, 2 * 6400 * H / 10e9], rel=1e-6)
    (alone,) = costs("tp=8").parts.workers
    assert costs("tp=8").finish(alone).reduce == 0


HELD = L * SIZES.layer_parameters / 8 + 6400 * H + H
"""Parameters of one of eight tensor-parallel ranks."""

ONCE = (3 / 4) * 2 * HELD / 10e9
"""Seconds of a ring over four nodes with one rank in each, for two bytes of each parameter."""


@pytest.mark.parametrize(
    ("spelled", "sharded", "reduce", "exchange"),
    [
        ("dp=4,tp=8", True, 2 * ONCE, 0),
        ("fsdp=4,zero=1,tp=8", True, ONCE, ONCE),
        ("fsdp=4,zero=1,tp=8", False, 2 * ONCE, ONCE),
    ],
)
def test_gradients_after_the_passes(spelled: str, sharded: bool, reduce: float, exchange: float) -> None:
    found = costs(spelled, sharded_reduction=sharded)
    (worker,) = found.parts.workers
    finish = found.finish(worker)
    assert (finish.reduce, finish.exchange) == pytest.approx((reduce, exchange), rel=1e-6)
    assert found.prediction().exposed_communication_seconds >= reduce + exchange


def test_gradients_in_single_precision() -> None:
    found = costs("dp=4,tp=8", gradient_bytes=4)
    assert found.finish(found.parts.workers[0]).reduce == pytest.approx(4 * ONCE, rel=1e-6)


def test_each_replica_updates_its_part() -> None:
    whole, part = (costs(spelled) for spelled in ("dp=4,tp=8", "fsdp=4,zero=1,tp=8"))
    seconds = [each.finish(each.parts.workers[0]).update for each in (whole, part)]
    assert seconds == pytest.approx([44 * HELD / 1e12, 44 * HELD / 4 / 1e12], rel=1e-6)


def test_parameters_are_gathered_during_the_next_forward_pass() -> None:
    found = costs("fsdp=4,zero=1,tp=8", overlap_parameters=True, micro_batch=64)
    assert found.finish(found.parts.workers[0]).exchange == pytest.approx(0.25 * ONCE, rel=1e-6)


def test_gradients_are_reduced_during_the_backward_pass() -> None:
    # each block's gradients are one bucket, behind which the next block hides; the last block's and the embedding's are
    # reduced after it, while the embedding's backward pass runs
    found = costs("dp=4,tp=8", overlap_gradients=True, micro_batch=64)
    (stage,) = found.parts.stages.values()
    passed = found.stages.passed(stage, BACKWARD, None, final=True, first=False)
    of_block = 2 * (3 / 4) * 2 * (SIZES.layer_parameters // 8) / 10e9
    of_embedding = 2 * (3 / 4) * 2 * 6400 * H / 10e9
    end = found.times.backward.between(0, 1).device
    assert found.times.backward.between(1, 2).device > of_block > end
    assert passed.communication == pytest.approx(2 * ONCE, rel=1e-6)
    slow = end * (1 / 0.75 - 1)  # it computes at three quarters of its speed meanwhile
    assert passed.exposed == pytest.approx(of_block - end - slow + of_embedding, rel=1e-4)
    assert passed.slowed == pytest.approx(0.25 * (passed.communication - passed.exposed))
    assert found.finish(found.parts.workers[0]).reduce == 0


def test_positions_do_not_delay_other_gradients() -> None:
    # the embedding of positions has its gradient last, too
    plain, learned = (
        costs("dp=4,tp=8", replace(SIZES, learned_positions=each), overlap_gradients=True, micro_batch=64)
        for each in (False, True)
    )
    exposed = [each.prediction().exposed_communication_seconds for each in (plain, learned)]
    assert exposed[1] - exposed[0] == pytest.approx(2 * (3 / 4) * 2 * S * H / 8 / 10e9, rel=0.01)


def test_fsdp_gathers_half_precision_and_reduces_single() -> None:
    # four nodes of eight ranks share a ring: 31/32 of a block over the eight ports of a node
    found = costs("fsdp=32", gathered_bytes=2, gradient_bytes=4)
    (stage,) = found.parts.stages.values()
    sync = Sync(blocks=True, root=True, reduces=True)
    pieces = found.stages.pieces(stage, BACKWARD, sync, True, found.stages.spent(stage, BACKWARD))
    once = (31 / 32) * SIZES.layer_parameters / 80e9
    root, *blocks = [piece for piece in pieces if piece.gather]
    assert [piece.gather for piece in blocks] == pytest.approx([2 * once] * L, rel=1e-6)
    assert [sum(piece.reductions) for piece in blocks] == pytest.approx([4 * once] * L, rel=1e-6)
    assert root.gather == pytest.approx((31 / 32) * 2 * (50304 + 1) * H / 80e9, rel=1e-3)


def test_networks_that_the_host_drives_are_slower() -> None:
    reduce = Collective("all_reduce", 10**9, Group(4, 8))
    hosted = replace(CLUSTER, levels=(CLUSTER.levels[0], replace(CLUSTER.levels[1], name="omni-path-100")))
    assert collective_seconds(reduce, CLUSTER, NUMBERS) == pytest.approx(2 * (3 / 4) * 0.1)
    assert collective_seconds(reduce, hosted, NUMBERS) == pytest.approx(2 * (3 / 4) * 0.2)
    message = Collective("send", 10**9, Group(2, 8))
    assert collective_seconds(message, hosted, NUMBERS) == pytest.approx(0.2)
