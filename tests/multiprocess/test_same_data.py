"""Workers that are given other data than the rest: told before it is trained on, by all of them, in one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from shardwise.parallel.program import Program
from shardwise.run.training.job import Job, Options
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.loading import Loading
from shardwise.workload.reading.order import epoch_order
from shardwise.workload.source import Source
from shardwise.workload.workload import Evaluation, Workload

BATCH = 8
Sample = tuple[Tensor, Tensor]


def rows(count: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


class Stream(IterableDataset[Sample]):
    """`lengths[rank]` samples; reading number `broken` fails on the last rank."""

    def __init__(self, lengths: list[int], broken: int | None = None) -> None:
        self.rank = dist.get_rank() if dist.is_initialized() else 0
        self.length, self.broken = lengths[self.rank], broken

    def __iter__(self) -> Iterator[Sample]:
        samples = rows(64)
        for number in range(self.length):
            if number == self.broken and self.rank == dist.get_world_size() - 1:
                raise KeyError("the 20th is gone")
            yield samples[number]


def workload(dataset: Any, **changes: Any) -> Workload:
    options: dict[str, Any] = {
        "name": "data",
        "model": lambda: nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)),
        "dataset": dataset,
        "inputs": lambda batch: batch[0],
        "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "batch_size": BATCH,
    }
    return Workload(**{**options, **changes})


def held_out(dataset: Any, name: str = "") -> Evaluation:
    return Evaluation(dataset=dataset, metric="m", measure=lambda output, batch: torch.zeros(()), name=name)


def build(strategy: str, field: str) -> str:
    """Return what a worker says of a program that is built where one field is another on its last rank."""
    last = dist.get_rank() == dist.get_world_size() - 1
    changes: dict[str, Any] = {
        "evaluation": [
            held_out(rows(5 if last and field == "evaluation" else 6)),
            held_out(rows(3 if last and field == "further" else 4), name="further"),
        ]
    }
    if last and field in ("seed", "batch_size"):
        changes[field] = 4
    work = workload(rows(40 if last and field == "dataset" else 64), **changes)
    try:
        Program.build(work, Strategy.parse(strategy))
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


@pytest.mark.parametrize("strategy", ["dp=2", "tp=2", "pp=2", "fsdp=2"])
def test_datasets_of_two_lengths(workers: Pools, strategy: str) -> None:
    found = workers(2, build, strategy, "dataset")
    line = (
        "DataError: the dataset of workload 'data' has 64 samples on rank 0, 40 samples on rank 1: it must be the same "
        "on every worker"
    )
    assert found == [line] * 2


@pytest.mark.parametrize(
    ("field", "words"),
    [
        (
            "evaluation",
            "the held-out dataset of workload 'data' has 6 samples and 4 samples on ranks 0, 1 and 2, "
            "5 samples and 4 samples on rank 3",
        ),
        (
            "further",
            "the held-out dataset of workload 'data' has 6 samples and 4 samples on ranks 0, 1 and 2, "
            "6 samples and 3 samples on rank 3",
        ),
        ("seed", "the order of the data of workload 'data' has seed=0 on ranks 0, 1 and 2, seed=4 on rank 3"),
        ("batch_size", "the batch of workload 'data' has batch_size=8 on ranks 0, 1 and 2, batch_size=4 on rank 3"),
        ("nothing", ""),
    ],
)
def test_what_else_must_be_the_same(workers: Pools, field: str, words: str) -> None:
    for line in workers(4, build, "dp=4", field):
        assert line.startswith(f"DataError: {words}" if words else "")
        assert bool(line) == bool(words)


def run(strategy: str, lengths: list[int], broken: int | None, options: Options) -> tuple[str, list[float]]:
    """Return what a worker says of a training, and the losses of its steps on rank 0."""
    work = workload(Stream(lengths, broken))
    job = Job(source=Source(workload=work), strategy=Strategy.parse(strategy), options=options)
    try:
        trained = train(Program.build(work, job.strategy), job)
    except Exception as error:
        return f"{type(error).__name__}: {error}", []
    return "", [step.loss for step in trained.steps]


@pytest.mark.parametrize("strategy", ["dp=2", "tp=2", "pp=2"])
@pytest.mark.parametrize(("short", "left"), [(20, "4 samples"), (16, "0 samples"), (17, "1 sample")])
def test_a_stream_that_ends_early(workers: Pools, strategy: str, short: int, left: str) -> None:
    """Within a batch, and between two: both ranks say so before the third step."""
    results = workers(2, run, strategy, [64, short], None, Options(epochs=1, quiet=True))
    line = (
        f"DataError: step 3: the stream of samples gave 8 samples on rank 0, {left} on rank 1: all workers must "
        "read the same stream"
    )
    assert [said for said, _ in results] == [line] * 2


@pytest.mark.parametrize("strategy", ["dp=2", "pp=2"])
def test_a_stream_that_breaks_on_one_rank(workers: Pools, strategy: str) -> None:
    (other, _), (own, _) = workers(2, run, strategy, [64, 64], 20, Options(epochs=1, quiet=True))
    assert own == "KeyError: 'the 20th is gone'"
    assert other.startswith("ShardwiseError: step 3: rank 1 could not read its samples: KeyError: 'the 20th is gone' (")
    assert "\n" not in other


@pytest.mark.parametrize("options", [Options(epochs=2, quiet=True), Options(steps=5, quiet=True)])
def test_streams_that_are_alike_are_read_to_their_end(workers: Pools, options: Options) -> None:
    """Over epochs with a small last batch, or up to a step within one."""
    alone = run("single", [28], None, options)
    for said, losses in workers(2, run, "dp=2", [28, 28], None, options)[:1]:
        assert said == ""
        assert losses == pytest.approx(alone[1], rel=1e-5)
        assert len(losses) == options.steps or 8


def test_the_step_of_a_later_epoch_is_named(workers: Pools) -> None:
    class Shrinking(Stream):
        def __iter__(self) -> Iterator[Sample]:
            yield from super().__iter__()
            self.length -= self.rank  # one sample less in the next epoch

    def both() -> str:
        work = workload(Shrinking([16, 16]))
        job = Job(source=Source(workload=work), strategy=Strategy.parse("dp=2"), options=Options(epochs=3, quiet=True))
        try:
            train(Program.build(work, job.strategy), job)
        except Exception as error:
            return str(error)
        return ""

    for said in workers(2, both):
        assert said.startswith("step 4: the stream of samples gave 8 samples on rank 0, 7 samples on rank 1")


class Differing(Dataset[Sample]):
    """Equal on all ranks but for one sample on the last rank, or drawn from a generator of the dataset's own."""

    def __init__(self, odd: int | None = None, own: bool = False) -> None:
        self.samples, self.own = rows(64), np.random.default_rng(0) if own else None
        self.odd = odd if dist.get_rank() == dist.get_world_size() - 1 else None

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> Sample:
        point, label = self.samples[index]
        if self.own is not None:
            point = point + float(self.own.random())
        return point, label + (index == self.odd)


def told(strategy: str, kind: str) -> str:
    """Return the message of a worker that trains on data that differs between workers."""
    kinds: dict[str, Callable[[], dict[str, Any]]] = {
        "first": lambda: {"dataset": Differing(epoch_order(64, 0, 0)[3])},
        "later": lambda: {"dataset": Differing(epoch_order(64, 0, 0)[BATCH + 1])},
        "held out": lambda: {"evaluation": [held_out(rows(4)), held_out(Differing(2), name="other")]},
        "own": lambda: {"dataset": Differing(own=True)},
        "collate": lambda: {"collate": drawn_anew},
        "sampler": lambda: {"loading": Loading(sampler=range(dist.get_rank(), 64))},
        "split": lambda: {"dataset": Split()},
    }
    work = workload(**{"dataset": rows(64), **kinds[kind]()})
    job = Job(source=Source(workload=work), strategy=Strategy.parse(strategy), options=Options(steps=6, quiet=True))
    try:
        train(Program.build(work, job.strategy), job)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def drawn_anew(samples: list[Sample]) -> list[Tensor]:
    """A batch from a generator that nobody else can seed."""
    generator = torch.Generator()
    generator.seed()
    return [torch.rand(len(samples), 4, generator=generator), torch.stack([label for _, label in samples])]


class Split(IterableDataset[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        samples = rows(64)
        for number in range(dist.get_rank(), 64, dist.get_world_size()):
            yield samples[number]


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("first", r"DataError: sample \d+ differs between workers at \[1\]: \d on rank 0, \d on rank 1: .*sort what"),
        (
            "held out",
            r"DataError: held-out sample 2 of 'other' differs between workers at \[1\]: \d on rank 0, .*sort what",
        ),
        (
            "own",
            r"DataError: sample \d+ of workload 'data' is another one each time it is read at \[0\]: .*by the",
        ),
        ("sampler", r"DataError: sample 0 differs between workers: sample 0 on rank 0, sample 1 on rank 1"),
        ("split", r"DataError: sample 0 of the stream differs between workers at \[0\]: .*take out what splits"),
    ],
)
def test_other_samples_are_told_before_the_first_step(workers: Pools, strategy: str, kind: str, words: str) -> None:
    found = workers(2, told, strategy, kind)
    assert found[0] == found[1]
    assert re.match(words, found[0])


@pytest.mark.parametrize("strategy", ["tp=2", "pp=2"])
@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("later", r"DataError: sample \d+ differs between workers at \[1\]: .*these workers compute the same samples"),
        ("collate", r"DataError: microbatch 0 of batch 0 in epoch 0 differs between workers at \[0\]: "),
    ],
)
def test_peers_that_read_other_samples_later(workers: Pools, strategy: str, kind: str, words: str) -> None:
    found = workers(2, told, strategy, kind)
    assert found[0] == found[1]
    assert re.match(words, found[0])
