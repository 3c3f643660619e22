"""Parameter servers: synchronous ones give what one process gives; with staleness, what it bounds."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import warm
from breaking import Breaking, assert_noticed
from equality import assert_equal, reference, resumed, shares_of, train
from pool import Pools
from test_data_parallel import DOUBLE, make, mlp
from test_optimizers import TOLERANCE, deep
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from shardwise.cluster.find import find_cluster
from shardwise.errors import NotFinite, RequestError, StrategyError, WorkloadError
from shardwise.parallel.operators.refused_modules import check_modules
from shardwise.parallel.optim import served
from shardwise.parallel.program import Program
from shardwise.parallel.servers import client, rows
from shardwise.parallel.servers.frames import receive_frame, send_frame
from shardwise.predict.closed_form.step_time import costs_of
from shardwise.predict.profile.profiler import Profiles
from shardwise.run.training.guard import Guard
from shardwise.run.training.job import SKIP, STOP
from shardwise.run.verification.first_step import prove_first_step
from shardwise.strategy import Strategy
from shardwise.workload.workload import Workload

STRATEGIES = ("ps=1,dp=2", "ps=2,dp=2", "ps=1,dp=4", "ps=2,dp=4")


@pytest.fixture(scope="module", autouse=True)
def _warm_servers(workers: Pools) -> None:
    """Fork parameter servers from a process that has imported torch; tests/processes starts interpreters of their own.

    A pool that replaces a broken one starts interpreters, too.
    """
    for count in (2, 4):
        workers(count, warm.start_here, warm.server_address())


def clipped() -> Workload:
    return replace(
        mlp(), clip_norm=0.05, schedule=lambda optimizer: torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    )


def momentum() -> Workload:
    return mlp(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, nesterov=True))


def weighted() -> Workload:
    """Samples of weight 0 to 3; some replicas' microbatches have none at all."""

    def weights(batch: Any) -> Tensor:
        found: Tensor = (batch[0][:, 0].abs() * 2).floor()
        return found

    def loss(output: Tensor, batch: Any) -> Tensor:
        each = nn.functional.cross_entropy(output, batch[1], reduction="none")
        total: Tensor = (each * weights(batch)).sum() / weights(batch).sum()
        return total

    return mlp(loss=loss, weight=lambda batch: weights(batch).sum())


class Words(nn.Module):
    """Few of the rows of the first table are used, and the second one is sparse in torch's sense."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, 6)
        self.other = nn.Embedding(50, 6, sparse=True)
        self.head = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.head(self.table(x) * self.other(x))
        return output


def words() -> Workload:
    draw = torch.Generator().manual_seed(2)
    data = TensorDataset(torch.randint(0, 50, (32,), generator=draw), torch.randint(0, 3, (32,), generator=draw))
    optimizer = lambda parameters: torch.optim.SGD(parameters, lr=0.5)  # noqa: E731
    return make(Words, dataset=data, optimizer=optimizer, evaluation=None)


def squeezed() -> Workload:
    return replace(mlp(), after_step=lambda name, tensor: tensor.clamp_(-0.3, 0.3))


@pytest.mark.parametrize(
    ("strategy", "factory"),
    [
        *((strategy, clipped) for strategy in STRATEGIES),
        *(("ps=2,dp=2", each) for each in (momentum, weighted, squeezed)),
    ],
)
def test_synchronous_servers_give_what_one_process_gives(
    workers: Pools, strategy: str, factory: Callable[[], Workload]
) -> None:
    expected = reference(workers, factory, strategy, 4, evaluate=True)
    assert_equal(train(workers, factory, strategy, 4, evaluate=True), expected, DOUBLE)


@pytest.mark.parametrize("strategy", ["ps=3,dp=2,microbatches=2", "ps=2,dp=2,shares=3:1", "ps=1,dp=2,recompute=full"])
def test_options_beside_servers(workers: Pools, strategy: str) -> None:
    assert_equal(
        train(workers, clipped, strategy), reference(workers, clipped, strategy.replace(",recompute=full", "")), DOUBLE
    )


def test_optimizers_of_whole_matrices(workers: Pools) -> None:
    assert_equal(train(workers, deep, "ps=2,dp=2"), reference(workers, deep, "ps=2,dp=2"), TOLERANCE)


def test_rows_and_sparse_gradients(workers: Pools) -> None:
    for strategy in ("ps=2,dp=2", "ps=1,dp=4"):
        assert_equal(train(workers, words, strategy), reference(workers, words, strategy), DOUBLE)


def sent_bytes(factory: Callable[[], Workload]) -> tuple[int, int]:
    """Bytes of gradients that this worker gives in a step, and those of all of its gradients."""
    program = Program.build(factory(), Strategy.parse("ps=1,dp=2"))
    sizes: list[int] = []

    def counted(gradients: Any) -> Any:
        tensors, sparse = rows.contribution(gradients)
        sizes.append(sum(each.numel() * each.element_size() for each in tensors.values()))
        return tensors, sparse

    with mock.patch.object(served, "contribution", counted):
        program.step_share(next(shares_of(program, 1)))
    whole = sum(each.numel() * each.element_size() for each in program.engine.parameters.values())
    program.full_state_dict()
    return sizes[0], whole


def test_only_used_rows_are_sent(workers: Pools) -> None:
    for sent, whole in workers(2, sent_bytes, words):
        assert sent < 0.25 * whole
    for sent, whole in workers(2, sent_bytes, mlp):
        assert sent == whole


BROKEN: dict[str, tuple[Callable[[], Workload], Breaking]] = {
    "sent twice": (
        momentum,
        lambda: mock.patch.object(
            served, "contribution", lambda given: rows.contribution({n: g * 2 for n, g in given.items()})
        ),
    ),
    "a row is lost": (
        words,
        lambda: mock.patch.object(
            served,
            "contribution",
            lambda given: (
                {n: t[1:] if "/table" in n else t for n, t in rows.contribution(given)[0].items()},
                rows.contribution(given)[1],
            ),
        ),
    ),
    "clipped by nothing": (
        clipped,
        lambda: mock.patch("shardwise.parallel.program.clip_factor", return_value=torch.ones(())),
    ),
    "no schedule": (
        clipped,
        lambda: mock.patch.object(served.ServedParameters, "_changed_options", return_value=[]),
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_wrong_is_noticed(workers: Pools, name: str) -> None:
    factory, breaking = BROKEN[name]
    assert_noticed(workers, factory, "ps=2,dp=2", breaking)


# ---- checkpoints ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("ps=2,dp=2", "single"),
        ("dp=2", "ps=1,dp=2"),
        ("ps=1,dp=2", "ps=2,dp=2"),
        ("fsdp=2", "ps=2,dp=2"),
        ("ps=2,dp=2,staleness=2", "fsdp=2,zero=1"),
    ],
)
def test_runs_go_on_under_other_strategies(workers: Pools, tmp_path: Path, before: str, after: str) -> None:
    count, then = Strategy.parse(before).workers, Strategy.parse(after).workers
    first = workers(count, resumed, clipped, tmp_path, before, 3)[0]
    second = workers(then, resumed, clipped, tmp_path, after, 3)[0]
    if "staleness" in before:
        return
    expected = reference(workers, clipped, "dp=2", 6).losses
    torch.testing.assert_close([*first, *second], expected, rtol=1e-9, atol=0)


# ---- staleness ------------------------------------------------------------------------------------------------------


def clocks(strategy: str, slow_seconds: float) -> tuple[list[float], list[Tensor], float]:
    """Times after each step of this worker, of which rank 1 is slow, and the parameters at the end."""
    program = Program.build(momentum(), Strategy.parse(strategy))
    times = []
    for share in shares_of(program, 8):
        time.sleep(slow_seconds * program.mesh.rank)
        program.step_share(share)
        times.append(time.monotonic())
    pieces = [piece.local.clone() for piece in program.pieces() if piece.name.startswith("model/")]
    return times, pieces, program.evaluate()["loss"]


@pytest.mark.parametrize("staleness", [1, 3, None])
def test_a_fast_worker_is_ahead_by_no_more_than_it_may(workers: Pools, staleness: int | None) -> None:
    spelled = "unbounded" if staleness is None else str(staleness)
    (fast, ours, loss), (slow, theirs, other) = workers(2, clocks, f"ps=2,dp=2,staleness={spelled}", 0.15)
    ahead = [sum(each <= time_ for each in fast) - sum(each <= time_ for each in slow) for time_ in fast]
    if staleness is None:
        assert fast[-1] < slow[0] + 0.5, "it waited"
    else:
        assert max(ahead) <= staleness + 1
        assert fast[-1] > slow[7 - staleness - 1], "it did not wait"
    for one, another in zip(ours, theirs, strict=True):
        assert torch.equal(one, another), "workers end with other parameters"
    assert loss == other


def proof(strategy: str) -> tuple[bool, float | None]:
    program = Program.build(clipped(), Strategy.parse(strategy))
    found = prove_first_step(program)
    program.step_share(next(shares_of(program, 1)))
    return found.proved, found.gradient_error


@pytest.mark.parametrize("strategy", ["ps=2,dp=2", "ps=2,dp=2,staleness=2"])
def test_the_first_step_is_proved(workers: Pools, strategy: str) -> None:
    for proved, error in workers(2, proof, strategy):
        assert proved
        assert error is not None
        assert error < DOUBLE


def learned(strategy: str) -> tuple[float, float]:
    gentle = mlp(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05))
    program = Program.build(gentle, Strategy.parse(strategy))
    losses = [float(program.step_share(share)) for share in shares_of(program, 80)]
    return sum(losses[:20]), sum(losses[-20:])


def test_training_with_staleness_learns(workers: Pools) -> None:
    for before, after in workers(2, learned, "ps=1,dp=2,staleness=3"):
        assert after < 0.9 * before, (before, after)


def not_finite(policy: str) -> tuple[int, str, int]:
    """Train with one sample that is not finite. Returns steps taken, the error, and how many were skipped."""
    data = torch.randn(64, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    data[21] = float("nan")
    work = momentum()
    labels = torch.zeros(64, dtype=torch.long)
    work = replace(work, dataset=TensorDataset(data, labels), evaluation=None)
    program = Program.build(work, Strategy.parse("ps=1,dp=2,staleness=2"))
    guard = Guard(program, policy, lambda line: None)
    error = ""
    try:
        for share in shares_of(program, 8):
            program.step_share(share)
            program.told_to_stop()
    except NotFinite as raised:
        error = str(raised)
    assert program.is_finite()
    return program.steps, error, guard.skipped


def test_all_workers_stop_at_one_step_if_one_is_not_finite(workers: Pools) -> None:
    found = workers(2, not_finite, STOP)
    assert len({steps for steps, _, _ in found}) == 1
    assert all("the loss is nan" in error for _, error, _ in found)
    found = workers(2, not_finite, SKIP)
    assert [(steps, error) for steps, error, _ in found] == [(8, "")] * 2
    assert sum(skipped for *_, skipped in found) == 1


# ---- what dies ------------------------------------------------------------------------------------------------------


def with_kills(strategy: str, seed: int) -> list[float]:
    """Losses of a training whose servers are killed at drawn moments."""
    program = Program.build(clipped(), Strategy.parse(strategy))
    hosted = program._update.served.hosted  # type: ignore[union-attr]
    draw, over = random.Random(f"{seed} {program.mesh.rank}"), threading.Event()

    def kill() -> None:
        for each in hosted.values():
            if not over.wait(draw.uniform(0, 0.3)):
                os.kill(each.pid, signal.SIGKILL)

    killer = threading.Thread(target=kill)
    killer.start()
    losses = []
    for share in shares_of(program, 6):
        losses.append(float(program.step_share(share)))
        time.sleep(0.05)
    over.set()
    killer.join()
    program.full_state_dict()
    return losses


@pytest.mark.parametrize("seed", range(2))
def test_a_training_goes_on_when_its_servers_are_killed(workers: Pools, seed: int) -> None:
    expected = train(workers, clipped, "ps=2,dp=2", 6).losses
    for losses in workers(2, with_kills, "ps=2,dp=2", seed):
        assert losses == expected


# ---- refusals -------------------------------------------------------------------------------------------------------


def built(strategy: str, factory: Callable[[], Workload], **environment: str) -> None:
    with mock.patch.dict(os.environ, environment):
        Program.build(factory(), Strategy.parse(strategy))


def test_wrong_hosts_and_tokens_are_refused_on_all_workers(workers: Pools) -> None:
    for setting, value, told in (
        (served.HOST_SETTING, "203.0.113.7", "this host cannot listen there"),
        (served.HOST_SETTING, "no.such.host.invalid", "this host cannot listen there"),
        (served.HOST_SETTING, "0.0.0.0", "give the one address of this host"),
        ("SHARDWISE_TOKEN", "short", "has 5 characters"),
    ):

        def wrong(setting: str = setting, value: str = value) -> None:
            built("ps=1,dp=2", mlp, **{setting: value})

        with pytest.raises(RequestError, match=told):
            workers(2, wrong)


def averaged() -> Workload:
    return replace(mlp(), average=0.9)


def test_what_servers_cannot_train_is_refused(workers: Pools) -> None:
    with pytest.raises(StrategyError, match=r"ps=99: the model has \d+ trained parameters: use ps="):
        workers(2, built, "ps=99,dp=2", mlp)
    with pytest.raises(StrategyError, match="average of workload 'points' needs all workers at the same step"):
        workers(2, built, "ps=1,dp=2,staleness=1", averaged)
    normed = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    check_modules(mlp(), Strategy.parse("ps=1,dp=2"), normed)
    with pytest.raises(WorkloadError, match="normalises over the samples of all workers"):
        check_modules(mlp(), Strategy.parse("ps=1,dp=2,staleness=1"), normed)


# ---- what is predicted ----------------------------------------------------------------------------------------------


def moved(strategy: str) -> list[list[int]]:
    """Bytes of the tensors that this worker sends to and receives from each server in a step."""
    program = Program.build(momentum(), Strategy.parse(strategy))
    sent: list[int] = []
    received: list[int] = []

    def sending(line: Any, frame: Any) -> None:
        sent.append(frame.data_bytes)
        send_frame(line, frame)

    def receiving(line: Any, limit: int) -> Any:
        frame = receive_frame(line, limit)
        received.append(frame.data_bytes)
        return frame

    with mock.patch.object(client, "send_frame", sending), mock.patch.object(client, "receive_frame", receiving):
        program.step_share(next(shares_of(program, 1)))
    program.full_state_dict()
    return [[each for each in found if each] for found in (sent, received)]


@pytest.mark.parametrize("strategy", ["ps=1,dp=2", "ps=3,dp=2", "ps=2,dp=2,staleness=2"])
def test_messages_are_predicted_to_the_byte(workers: Pools, strategy: str) -> None:
    costs = costs_of(
        Profiles(momentum(), "cpu").of(Strategy.parse(strategy)), Strategy.parse(strategy), find_cluster("epyc-7763x8")
    )
    program = costs.stages.program.served(costs.parts.workers[0])
    predicted = [[each.bytes for each in program if each.when == when] for when in ("push", "pull")]
    for found in workers(2, moved, strategy):
        assert found == predicted
