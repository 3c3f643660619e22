"""Contributions become the updates of one process; equal events give equal bits."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from serving import SHAPES, adam, apply, first, gradients, push, shard, write
from torch import Tensor, nn

from shardwise.parallel.servers.frames import Frame, Kind
from shardwise.parallel.servers.rows import contribution, mean
from shardwise.parallel.servers.shard import Shard


def momentum(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


def alone(steps: int, ranks: int, optimizer: Any = adam, factor: float = 1.0) -> dict[str, Tensor]:
    """Parameters after steps of one process on the mean gradients."""
    held = {name: nn.Parameter(value) for name, value in first().items()}
    made = optimizer(list(held.values()))
    for step in range(steps):
        for name, parameter in held.items():
            parameter.grad = torch.stack([gradients(rank, step)[name] for rank in range(ranks)]).mean(0) * factor
        made.step()
    return {name: parameter.detach() for name, parameter in held.items()}


def assert_parameters(made: Shard, expected: dict[str, Tensor]) -> None:
    for name, parameter in made.parameters.items():
        torch.testing.assert_close(parameter.detach(), expected[name])


@pytest.mark.parametrize("optimizer", [adam, momentum])
@pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
def test_joint_updates_are_those_of_one_process_in_any_order(order: tuple[int, ...], optimizer: Any) -> None:
    made, first_order = shard(3, optimizer=optimizer), shard(3, optimizer=optimizer)
    for step in range(3):
        for server, ranks in ((made, order), (first_order, range(3))):
            for rank in ranks:
                assert server.joined == step
                server.take(push(rank, step, together=True))
            server.take(apply(step, factor=0.5))
    assert_parameters(made, alone(3, 3, optimizer, 0.5))
    for name, parameter in made.parameters.items():
        assert torch.equal(parameter, first_order.parameters[name]), "the order of arrival changes bits"
    assert made.losses == (1.0,)


def test_a_joint_mean_that_is_not_applied_changes_nothing() -> None:
    made = shard(2)
    for rank in range(2):
        made.take(push(rank, 0, together=True))
    expected = torch.stack([gradients(rank, 0)["bias"] for rank in range(2)]).mean(0)
    torch.testing.assert_close(made.shown_gradients()["g/bias"], expected)
    made.take(apply(0, applied=False))
    assert_parameters(made, first())
    assert not made.optimizer.state


def test_a_repeated_request_is_known() -> None:
    made = shard(2)
    event = push(0, 0, together=True)
    assert made.is_new(event)
    made.take(event)
    assert not made.is_new(push(0, 0, together=True))
    made.take(push(1, 0, together=True))
    assert made.is_new(apply(0))
    made.take(apply(0))
    assert not made.is_new(apply(0))


def test_the_norm_is_that_before_clipping_also_for_a_worker_that_asks_late() -> None:
    made = shard(2)
    for rank in range(2):
        made.take(push(rank, 0, together=True))
    before = made.square
    made.take(apply(0, factor=0.1))
    assert made.square == before > 0


def test_servers_of_parts_update_as_one_of_all() -> None:
    whole, parts = shard(2), [shard(2, ["table"]), shard(2, ["weight", "bias"])]
    for step, rank in itertools.product(range(2), range(2)):
        for made in (whole, *parts):
            made.take(push(rank, step, together=True))
            if rank:
                made.take(apply(step))
    for part in parts:
        for name, parameter in part.parameters.items():
            assert torch.equal(parameter, whole.parameters[name])
    assert whole.square == pytest.approx(sum(part.square for part in parts))


def test_an_update_apart_takes_as_many_contributions_as_there_are_members() -> None:
    """A fast worker may give both; those of equal steps make the update of one process."""
    made = shard(2)
    made.take(push(0, 0, together=False))
    assert made.updates == 0
    assert_parameters(made, first())
    made.take(push(1, 0, together=False))
    assert made.updates == 1
    assert_parameters(made, alone(1, 2))
    made.take(push(0, 1, together=False))
    made.take(push(0, 2, together=False))
    assert made.updates == 2
    assert (made.slowest(), made.front()) == (1, 3)


def test_contributions_count_by_their_weight_and_those_of_weight_zero_not_at_all() -> None:
    made = shard(3)
    made.take(push(0, 0, together=False, weight=3.0))
    made.take(push(1, 0, together=False, weight=1.0))
    made.take(push(2, 0, together=False, weight=0.0, given={}, losses=[float("nan")]))
    expected = 0.75 * gradients(0, 0)["bias"] + 0.25 * gradients(1, 0)["bias"]
    torch.testing.assert_close(made.gradients["bias"], expected)
    assert made.losses == (0.25,)


def test_a_parameter_that_nobody_used_is_left_alone() -> None:
    made = shard(2)
    for rank in range(2):
        given = gradients(rank, 0)
        del given["weight"]
        made.take(push(rank, 0, together=True, given=given))
    made.take(apply(0))
    assert torch.equal(made.parameters["weight"], first()["weight"])
    assert made.parameters["weight"] not in made.optimizer.state


def test_a_dropped_worker_is_not_waited_for_and_can_come_back() -> None:
    made = shard(2)
    made.take(push(0, 0, together=True))
    assert made.joined == 0
    made.take(Frame(Kind.DROP, {"rank": 1, "together": True}))
    assert made.joined == 1
    made.take(apply(0))
    torch.testing.assert_close(made.gradients["bias"], gradients(0, 0)["bias"])
    made.take(Frame(Kind.ENTER, {"rank": 1, "clock": made.front()}))
    made.take(push(0, 1, together=True))
    assert made.joined == 1
    made.take(push(1, 1, together=True))
    assert made.joined == 2


def test_groups_take_the_numbers_of_a_schedule() -> None:
    made = shard(1)
    made.take(push(0, 0, together=False, options=[{"lr": 0.025, "betas": [0.5, 0.9]}]))
    assert made.optimizer.param_groups[0]["lr"] == 0.025
    assert made.optimizer.param_groups[0]["betas"] == (0.5, 0.9)
    assert made.optimizer.param_groups[0]["weight_decay"] == 0.01


def events(together: bool) -> list[Frame]:
    found = [write()]
    for step in range(4):
        found += [push(rank, step, together=together) for rank in range(2)]
        found += [apply(step, factor=0.9)] if together else []
    return found + [push(0, 4, together=together)]


@pytest.mark.parametrize("together", [True, False])
def test_a_state_and_the_events_after_it_give_the_same_bits(together: bool) -> None:
    log = events(together)
    expected = Shard(shard(2).workload, shard(2).trained, tuple(SHAPES), 2)
    for event in log:
        expected.take(event)
    for cut in range(len(log)):
        before = Shard(expected.workload, expected.trained, tuple(SHAPES), 2)
        for event in log[:cut]:
            before.take(event)
        after = Shard(expected.workload, expected.trained, tuple(SHAPES), 2)
        after.take(before.state())
        for event in log[cut:]:
            after.take(event)
        ours, theirs = after.state(), expected.state()
        assert ours.facts == theirs.facts, cut
        assert ours.tensors.keys() == theirs.tensors.keys()
        assert all(torch.equal(value, theirs.tensors[name]) for name, value in ours.tensors.items()), cut


def test_all_workers_can_still_reach_the_clock_at_which_they_stop() -> None:
    made = shard(2)
    for clock in range(3):
        made.take(push(0, clock, together=False))
    made.take(push(1, 0, together=False, stop=15))
    assert (made.stop_at, made.reason) == (4, 15)
    made.take(push(0, 3, together=False, stop="later"))
    assert (made.stop_at, made.reason) == (4, 15)


# ---- rows -----------------------------------------------------------------------------------------------------------


def test_only_rows_that_were_used_are_sent() -> None:
    given = gradients(0, 0)
    tensors, sparse = contribution(given)
    assert sparse == []
    assert sorted(tensors) == ["g/bias", "g/weight", "i/table", "r/table"]
    assert tensors["r/table"].shape == (2, 3)
    found = mean("table", (8, 3), [(1.0, tensors, sparse)])
    assert found is not None
    assert torch.equal(found, given["table"])


def test_a_sparse_gradient_stays_one_and_dense_rows_stay_dense() -> None:
    given = {"table": gradients(0, 0)["table"].to_sparse(1)}
    both = [(1.0, *contribution(given)), (1.0, *contribution({"table": gradients(1, 0)["table"].to_sparse(1)}))]
    expected = (gradients(0, 0)["table"] + gradients(1, 0)["table"]) / 2
    found = mean("table", (8, 3), both)
    assert found is not None
    assert found.is_sparse
    torch.testing.assert_close(found.to_dense(), expected)
    mixed = mean("table", (8, 3), [both[0], (1.0, *contribution({"table": gradients(1, 0)["table"]}))])
    assert mixed is not None
    assert not mixed.is_sparse
    torch.testing.assert_close(mixed, expected)


def test_sparse_gradients_train_as_in_one_process() -> None:
    made = shard(2, ["table"], optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    held = nn.Parameter(first()["table"])
    alone_ = torch.optim.SGD([held], lr=0.1)
    for step in range(3):
        for rank in range(2):
            made.take(push(rank, step, together=True, given={"table": gradients(rank, step)["table"].to_sparse(1)}))
        made.take(apply(step))
        held.grad = ((gradients(0, step)["table"] + gradients(1, step)["table"]) / 2).to_sparse(1)
        alone_.step()
    torch.testing.assert_close(made.parameters["table"].detach(), held.detach())


def regrouped(settled: int, generation: int = 1, **settling: Any) -> Frame:
    facts = {"generation": generation, "settled": settled, "clock": settled, **settling}
    return Frame(Kind.REGROUP, facts)


def test_workers_that_meet_again_go_on_from_the_last_mean_that_a_server_has_settled() -> None:
    """One server has settled the mean of the second step, the other one has not: it settles it as that one did."""
    parts = [shard(2, ["table"]), shard(2, ["weight", "bias"])]
    for made in parts:
        for step in range(2):
            for rank in range(2):
                made.take(push(rank, step, together=True))
            if step == 0 or made is parts[0]:
                made.take(apply(step, factor=0.5))
        made.take(push(0, 2, together=True))  # worker 1 dies before it gives its own
    for made in parts:
        again = regrouped(2, **parts[0].settling)
        assert made.is_new(again)
        made.take(again)
        assert not made.is_new(again)
        assert not made.is_new(apply(2)), "of a mean that is not there"
        assert (made.joined, made.settled, made.updates, made.waiting) == (2, 2, 2, [])
        for rank in range(2):
            made.take(push(rank, 2, together=True))
        made.take(apply(2, factor=0.5))
    whole = alone(3, 2, factor=0.5)
    for made in parts:
        assert_parameters(made, {name: whole[name] for name in made.parameters})


def test_a_server_that_died_since_workers_met_again_knows_it() -> None:
    made, copy = shard(2), shard(2)
    for rank in range(2):
        made.take(push(rank, 0, together=True))
    made.take(apply(0))
    made.take(regrouped(1, **made.settling))
    copy.take(made.state())
    assert (copy.generation, copy.settling, copy.clocks) == (1, made.settling, {0: 1, 1: 1})
