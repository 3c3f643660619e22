"""Pipelines over a network that ignores tags and keeps the order of posts, as NCCL does."""

from __future__ import annotations

import threading
from collections import defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from shardwise.parallel.pipeline import channels, executor
from shardwise.parallel.pipeline.channels import open_channels, pairs_of
from shardwise.parallel.pipeline.executor import PipelineExecutor, PipelinePass
from shardwise.splitting.schedule import order
from shardwise.strategy import Strategy

CASES = (
    *((schedule, workers, 1) for schedule in ("gpipe", "1f1b", "zero-bubble") for workers in (2, 3, 4)),
    *(("interleaved", workers, stages) for workers, stages in ((2, 2), (2, 3), (4, 2))),
)
MICROBATCHES = 8


# ---- the network ----------------------------------------------------------------------------------------------------


class Stuck(Exception):
    """All workers wait for each other."""


class Message:
    """A send or a receive that a worker has posted."""

    def __init__(self, network: Network, tensor: Tensor, *, sends: bool) -> None:
        self.tensor, self.sends, self.done = tensor, sends, False
        self.wait = lambda: network.wait(self)


class Network:
    """The functions of torch.distributed that a pipeline calls, for workers that are threads of this process.

    In one group, the messages between two workers move in the order in which each of them has posted its own, be they
    sent or received: the first of one side must fit the first of the other side before any later one moves.
    """

    def __init__(self, workers: int) -> None:
        self.workers, self.stuck = workers, False
        self.mine = threading.local()
        self._moved = threading.Condition()
        self._waited: list[Message] = []
        self._posted: Any = defaultdict(lambda: defaultdict(deque))

    def get_global_rank(self, group: object, worker: int) -> int:
        return worker

    def isend(self, tensor: Tensor, peer: int, group: object, tag: int) -> Message:
        return self._post(Message(self, tensor.clone(), sends=True), peer, group)

    def irecv(self, tensor: Tensor, peer: int, group: object, tag: int) -> Message:
        return self._post(Message(self, tensor, sends=False), peer, group)

    def wait(self, message: Message) -> None:
        with self._moved:
            self._waited.append(message)
            while not message.done:
                self._look()
                self._moved.wait()
            self._waited.remove(message)

    def leave(self) -> None:
        with self._moved:
            self.workers -= 1
            self._moved.notify_all()

    def _post(self, message: Message, peer: int, group: object) -> Message:
        rank = self.mine.rank
        with self._moved:
            sides = self._posted[group, min(rank, peer), max(rank, peer)]
            sides[rank].append(message)
            while sides[rank] and sides[peer] and sides[rank][0].sends != sides[peer][0].sends:
                received, sent = sorted((sides[rank].popleft(), sides[peer].popleft()), key=lambda each: each.sends)
                received.tensor.copy_(sent.tensor)
                sent.done = received.done = True
            self._moved.notify_all()
        return message

    def _look(self) -> None:
        """Raise Stuck if each worker waits for a message that nobody can move any more."""
        self.stuck |= len(self._waited) == self.workers and not any(each.done for each in self._waited)
        if self.stuck:
            self._moved.notify_all()
            raise Stuck


# ---- the pipeline ---------------------------------------------------------------------------------------------------


class Value:
    """A value that one stage hands to others."""

    meta = {"shape": (1,), "dtype": torch.float64, "grad": True}  # noqa: RUF012


def chain(stages: int) -> Any:
    """Stages that hand on one value each; the first one's goes to the last stage as well (a skip connection)."""
    values = [Value() for _ in range(stages - 1)]
    home = {value: stage for stage, value in enumerate(values)}
    uses = [tuple(values[max(0, stage - 1) : stage]) for stage in range(stages)]
    uses[-1] = tuple(dict.fromkeys((values[0], *uses[-1])))
    works = [SimpleNamespace(inputs=used, outputs=tuple(values[n : n + 1])) for n, used in enumerate(uses)]
    works[-1].outputs = (Value(),)
    return SimpleNamespace(stages=works, messages=lambda s, t: [v for v in works[t].inputs if home[v] == s])


class Stage(nn.Module):
    """Multiplies each input by a weight of its own, and adds the number of the microbatch."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.weights = nn.Parameter(torch.tensor([1.5 + number, 0.5 + number], dtype=torch.float64))

    def forward(self, work: Any, given: Any, inputs: list[Tensor]) -> tuple[Tensor, ...]:
        total = self.weights[0] * given["x"]
        for weight, value in zip(self.weights, inputs, strict=False):
            total = total + weight * value
        return (total,)


def trained(network: Network, schedule: str, workers: int, stages: int, *, apart: bool) -> list[Tensor]:
    """The gradients of all stages after a pass, with a group for each pair of stages or one for all."""
    work, modules = chain(workers * stages), [Stage(number) for number in range(workers * stages)]
    given = [{"x": torch.tensor([float(number + 1)], dtype=torch.float64)} for number in range(MICROBATCHES)]
    scales = [torch.tensor(1.0 / (number + 1), dtype=torch.float64) for number in range(MICROBATCHES)]
    unsplit: Any = SimpleNamespace(begin=lambda key: None, compute=lambda key: None)

    def table(worker: int) -> Any:
        return order(schedule, worker, workers, stages, MICROBATCHES)

    def run(worker: int) -> None:
        network.mine.rank = worker
        groups: Any = {pair: pair for pair in pairs_of([work], workers, worker)} if apart else None
        own: Any = dict(list(enumerate(modules))[worker::workers])
        pipeline = PipelineExecutor(own, worker, workers, "all", torch.device("cpu"), unsplit, groups)  # type: ignore[arg-type]
        try:
            pipeline.run(
                PipelinePass(
                    [work] * len(given),
                    table(worker),
                    table,
                    given,
                    scales,
                    lambda number: None,
                    lambda stage, last: None,
                )
            )
        finally:
            network.leave()

    with ThreadPoolExecutor(workers) as pool:
        for future in [pool.submit(run, worker) for worker in range(workers)]:
            future.result()
    return [module.weights.grad for module in modules if module.weights.grad is not None]


def alone(stages: int) -> list[Tensor]:
    """The gradients of all stages on one worker."""
    return trained(Network(1), "1f1b", 1, stages, apart=False)


@pytest.mark.parametrize(("schedule", "workers", "stages"), CASES)
def test_channels_keep_messages_apart(
    schedule: str, workers: int, stages: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    network = Network(workers)
    monkeypatch.setattr(executor, "dist", network)
    expected = alone(workers * stages)
    assert len(expected) == workers * stages
    torch.testing.assert_close(trained(network, schedule, workers, stages, apart=True), expected)


@pytest.mark.parametrize("schedule", ["1f1b", "zero-bubble"])
def test_one_group_for_all_messages_would_hang(schedule: str, monkeypatch: pytest.MonkeyPatch) -> None:
    network = Network(2)
    monkeypatch.setattr(executor, "dist", network)
    with pytest.raises(Stuck):
        trained(network, schedule, 2, 1, apart=False)


# ---- opening --------------------------------------------------------------------------------------------------------


def test_both_ends_open_the_same_channels_in_the_same_order() -> None:
    work = chain(6)
    found = [pairs_of([work], 3, worker) for worker in range(3)]
    for worker, pairs in enumerate(found):
        assert pairs == sorted(pairs)
        for pair in pairs:
            (other,) = {stage % 3 for stage in pair} - {worker}
            assert pair in found[other]
    assert (0, 5) in found[0]  # the skip connection
    assert (5, 0) in found[0]  # and its gradient
    assert (2, 1) not in found[0]  # of other workers


def mesh(kind: str, pp: int = 2) -> Any:
    strategy = Strategy(pp=pp)
    return SimpleNamespace(
        strategy=strategy,
        rank=0,
        device=torch.device(kind),
        group=lambda axis: "pp" if pp > 1 else None,
        coordinate=lambda axis: 0,
    )


def test_only_gpus_need_channels() -> None:
    assert open_channels([chain(2)], mesh("cpu")) == {}
    assert open_channels([chain(2)], mesh("cuda", pp=1)) == {}


def test_each_channel_greets_when_it_is_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[tuple[Any, ...]] = []
    fake = SimpleNamespace(
        get_global_rank=lambda group, worker: worker,
        new_group=lambda ranks, use_local_synchronization: tuple(ranks),
        send=lambda tensor, peer, group: done.append(("send", peer, group)),
        recv=lambda tensor, peer, group: done.append(("recv", peer, group)),
    )
    monkeypatch.setattr(channels, "dist", fake)
    monkeypatch.setattr(channels, "torch", SimpleNamespace(zeros=lambda count, device: None))
    found: Any = open_channels([chain(2)], mesh("cuda"))
    assert found == {(0, 1): (0, 1), (1, 0): (1, 0)}
    assert done == [("send", 1, (0, 1)), ("recv", 1, (1, 0))]
