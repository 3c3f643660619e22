"""Samplers, augmentation, streams and loading processes: trained as by one process, and resumed within an epoch."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from equality import check
from pool import Pools
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler
from traces import remembered

from shardwise.parallel.program import Program
from shardwise.run.training.job import Job, Options
from shardwise.run.training.train import train
from shardwise.strategy import Strategy
from shardwise.workload.loading import Loading
from shardwise.workload.reading.reader import Loaded, StreamReader
from shardwise.workload.source import Source
from shardwise.workload.workload import Workload

SAMPLES = 22
Sample = tuple[Tensor, int]


def drawn(index: int) -> Sample:
    noise = torch.randn(6, dtype=torch.float64) + random.random() + np.random.rand()
    return noise + index, index % 3


class Augmented(Dataset[Sample]):
    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        return drawn(index)


class Stream(IterableDataset[Sample]):
    def __iter__(self) -> Iterator[Sample]:
        return map(drawn, random.sample(range(SAMPLES), SAMPLES))


class Texts(Dataset[Sample]):
    """Between 2 and 6 tokens; 0 is padding."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Sample:
        return torch.arange(1, 3 + index * 7 % 5), index % 3


def padded(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    longest = max(len(text) for text, _ in samples)
    texts = [F.pad(text, (0, longest - len(text))) for text, _ in samples]
    return torch.stack(texts), torch.tensor([label for _, label in samples])


def noisy(samples: list[Sample]) -> tuple[Tensor, Tensor]:
    points = torch.stack([point for point, _ in samples])
    return points + torch.randn_like(points), torch.tensor([label for _, label in samples])


class Reader(nn.Module):
    """Mean over the tokens that are not padding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.hidden, self.head = nn.Embedding(8, 6), nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, texts: Tensor) -> Tensor:
        mask = (texts > 0).unsqueeze(-1).double()
        summed = (torch.relu(self.hidden(self.embed(texts))) * mask).sum(1)
        output: Tensor = self.head(summed / mask.sum(1))
        return output


def perceptron() -> nn.Module:
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 3)).double()


def lengths(epoch: int) -> list[list[int]]:
    """Batches of equal remainder, hence of few lengths, of sizes 4 and 5, in another order each epoch."""
    found = [list(range(first, SAMPLES, 5)) for first in range(5)]
    random.shuffle(found)
    return found


WEIGHTED = WeightedRandomSampler([1.0 + index for index in range(SAMPLES)], 30)

KINDS: dict[str, dict[str, Any]] = {
    "drawing": {},
    "weighted": {"loading": Loading(sampler=WEIGHTED, drop_last=True)},
    "curriculum": {"loading": Loading(sampler=lambda epoch: range(min(8 + 4 * epoch, SAMPLES)))},
    "unshuffled": {"loading": Loading(shuffle=False, drop_last=True)},
    "processes": {"loading": Loading(processes=2)},
    "stream": {"dataset": Stream()},
    "stream beside": {"dataset": Stream(), "loading": Loading(processes=2)},
    "collate": {"collate": noisy},
    "lengths": {
        "dataset": Texts(),
        "model": lambda: Reader().double(),
        "collate": padded,
        "loading": Loading(batch_sampler=lengths),
    },
}


class Kind:
    """Makes the workload of one kind; a class, so that equal ones share their reference."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Kind) and other.name == self.name

    def __hash__(self) -> int:
        return hash(self.name)

    def __call__(self) -> Workload:
        process: Any = multiprocessing.current_process()
        process._config["daemon"] = False  # the pool's workers may not have children otherwise
        fields: dict[str, Any] = {
            "name": self.name,
            "model": perceptron,
            "dataset": Augmented(),
            "inputs": lambda batch: batch[0],
            "loss": lambda output, batch: F.cross_entropy(output, batch[1]),
            "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.02),
            "batch_size": 8,
        }
        return Workload(**{**fields, **KINDS[self.name]})


@pytest.mark.parametrize("strategy", ["dp=2", "fsdp=2", "tp=2", "pp=2,microbatches=2"])
@pytest.mark.parametrize("kind", KINDS)
def test_equal_to_one_process(workers: Pools, kind: str, strategy: str) -> None:
    check(workers, Kind(kind), strategy, steps=4)


@pytest.mark.parametrize("strategy", ["fsdp=2,pp=2,microbatches=2", "dp=2,pp=2,microbatches=2,schedule=zero-bubble"])
def test_microbatches_of_other_lengths_on_each_replica(workers: Pools, strategy: str) -> None:
    check(workers, Kind("lengths"), strategy, steps=4)


def losses(kind: str, strategy: str, steps: int, folder: Path | None) -> list[float]:
    """Losses of a run up to a step, which goes on from the newest checkpoint in `folder`."""
    work = Kind(kind)()
    options = Options(steps=steps, quiet=True, resume=folder is not None)
    job = Job(source=Source(workload=work), strategy=Strategy.parse(strategy), options=options, folder=folder)
    before = set(multiprocessing.active_children())
    with remembered(Kind(kind)):
        program = Program.build(work, job.strategy)
    trained = train(program, job)
    assert set(multiprocessing.active_children()) == before
    return [step.loss for step in trained.steps]


class Quiet(IterableDataset[Sample]):
    """Stream that draws nothing, so that it is read ahead."""

    def __iter__(self) -> Iterator[Sample]:
        return ((torch.full((6,), float(index), dtype=torch.float64), index % 3) for index in range(SAMPLES))


def losses_where_one_worker_reads_apart(strategy: str) -> list[float]:
    """Losses of a run in which worker 0 takes what its model draws for draws of the stream."""
    read = StreamReader.beside

    def beside(self: StreamReader) -> Loaded:
        loaded = read(self)
        self.draws = dist.is_initialized() and dist.get_rank() == 0
        return loaded

    with mock.patch.object(StreamReader, "beside", beside), mock.patch.dict(KINDS, quiet={"dataset": Quiet()}):
        return losses("quiet", strategy, 2, None)


@pytest.mark.parametrize("strategy", ["dp=2", "tp=2"])
def test_each_worker_decides_whether_it_reads_ahead(workers: Pools, strategy: str) -> None:
    found = workers(2, losses_where_one_worker_reads_apart, strategy, timeout=60.0)[0]
    (alone,) = workers(1, losses_where_one_worker_reads_apart, "single")
    assert found == pytest.approx(alone, rel=1e-9)


@pytest.mark.parametrize("kind", KINDS)
def test_resumed_twice_within_an_epoch_under_other_strategies(workers: Pools, tmp_path: Path, kind: str) -> None:
    (uninterrupted,) = workers(1, losses, kind, "single", 9, None)
    found = []
    for strategy, steps in (("dp=2", 4), ("tp=2", 5), ("pp=2", 9)):
        found += workers(2, losses, kind, strategy, steps, tmp_path)[0]
    assert found == pytest.approx(uninterrupted, rel=1e-9)
