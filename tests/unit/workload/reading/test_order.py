"""Order of an epoch: by default, by a sampler, by a batch sampler; and what is refused, in one line."""

from __future__ import annotations

import pickle
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from shardwise.errors import DataError, WorkloadError
from shardwise.workload.loading import Loading
from shardwise.workload.reading import order
from shardwise.workload.reading.check import check_data
from shardwise.workload.reading.loader import Loader
from shardwise.workload.reading.order import epoch_batches
from shardwise.workload.workload import Evaluation, Workload

SAMPLES = 10


def lists(loading: Loading, epoch: int = 0) -> list[list[int]]:
    return [list(batch) for batch in epoch_batches(SAMPLES, 4, loading, 0, epoch)]


def test_default_order() -> None:
    first, second = (lists(Loading(), epoch) for epoch in (0, 1))
    assert sorted(index for batch in first for index in batch) == list(range(SAMPLES))
    assert first != second
    assert lists(Loading(shuffle=False)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]
    assert lists(Loading(shuffle=False, drop_last=True)) == [[0, 1, 2, 3], [4, 5, 6, 7]]


def test_default_order_is_a_permutation_of_four_bytes_a_sample() -> None:
    samples, size = 100_000, 64
    batches = epoch_batches(samples, size, Loading(), 3, 1)
    drawn = torch.randperm(samples, generator=torch.Generator().manual_seed(3 * 1_000_003 + 1)).tolist()
    assert [index for batch in batches for index in batch] == drawn
    assert batches[-1] == drawn[-(samples % size) :]
    assert batches[1:3] == [drawn[size : 2 * size], drawn[2 * size : 3 * size]]
    assert len(pickle.dumps(batches)) < 4.1 * samples  # what a worker holds, and each of its loading processes gets


@pytest.mark.parametrize(
    "sampler",
    [
        [5, 1, 1, 9, 0],
        torch.tensor([5, 1, 1, 9, 0]),
        np.array([5, 1, 1, 9, 0]),
        lambda epoch: iter([5, 1, 1, 9, 0][epoch:]),
    ],
)
def test_a_sampler(sampler: Any) -> None:
    assert lists(Loading(sampler=sampler)) == [[5, 1, 1, 9], [0]]
    assert lists(Loading(sampler=sampler, drop_last=True)) == [[5, 1, 1, 9]]


def test_a_batch_sampler() -> None:
    given = [[1, 2, 3], [4], [5, 6, 7, 8, 9]]
    assert lists(Loading(batch_sampler=given)) == given
    assert lists(Loading(batch_sampler=lambda epoch: given[epoch:]), 1) == given[1:]
    assert lists(Loading(batch_sampler=BatchSampler(SequentialSampler(range(SAMPLES)), 3, True))) == [
        [0, 1, 2],
        [3, 4, 5],
        [6, 7, 8],
    ]


@pytest.mark.parametrize("generator", [None, torch.Generator().manual_seed(5)])
def test_a_random_sampler_depends_on_the_epoch_alone(generator: torch.Generator | None) -> None:
    sampler = RandomSampler(range(SAMPLES), generator=generator)
    for loading in (Loading(sampler=sampler), Loading(batch_sampler=BatchSampler(sampler, 4, False))):
        before = torch.random.get_rng_state()
        third = lists(loading, 2)
        assert lists(loading, 0) != third
        assert lists(loading, 2) == third
        assert torch.equal(torch.random.get_rng_state(), before)


def test_steps_per_epoch() -> None:
    data = TensorDataset(torch.arange(SAMPLES))

    def steps(**loading: Any) -> int | None:
        return Loader(dataset=data, batch_size=4, loading=Loading(**loading)).batches

    assert (steps(), steps(drop_last=True), steps(sampler=[1] * 5), steps(batch_sampler=[[1], [2]])) == (3, 2, 2, 2)
    assert steps(sampler=lambda epoch: [epoch]) is None


@pytest.mark.parametrize(
    ("loading", "words"),
    [
        ({"sampler": [1, 10]}, "the sampler gives the index 10: the dataset has 10 samples, 0 to 9"),
        ({"sampler": [-1]}, "the sampler gives the index -1"),
        ({"sampler": ["a"]}, "the sampler gives 'a': it must give indices of the dataset, whole numbers"),
        ({"sampler": [0.5]}, "the sampler gives 0.5"),
        ({"sampler": []}, "the sampler gave no batch in epoch 0"),
        ({"sampler": [1], "drop_last": True}, "the sampler gave no batch in epoch 0"),
        ({"sampler": lambda epoch: None}, "the sampler returned None for epoch 0"),
        ({"batch_sampler": [[1], []]}, "batch 1 of the batch sampler is empty"),
        ({"batch_sampler": [3]}, "batch 0 of the batch sampler is 3: it must be a list of indices"),
        ({"batch_sampler": [[11]]}, "batch 0 of the batch sampler gives the index 11"),
    ],
)
def test_orders_that_are_refused(loading: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        lists(Loading(**loading))


def test_an_endless_sampler(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(order, "LEAST_MOST", 50)
    monkeypatch.setattr(order, "MOST_TIMES", 1)

    def endless(epoch: int) -> Any:
        while True:
            yield epoch

    with pytest.raises(DataError, match="the sampler has given 50 indices and goes on: it must end"):
        lists(Loading(sampler=endless))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"processes": -1}, "processes=-1 of Loading"),
        ({"processes": True}, "processes=True of Loading"),
        ({"sampler": [1], "batch_sampler": [[1]]}, "exclude each other"),
        ({"batch_sampler": [[1]], "drop_last": True}, "drop_last of Loading has no meaning beside a batch_sampler"),
        ({"sampler": 3}, "sampler of Loading must give indices, or be a function of the epoch"),
        ({"sampler": iter([1])}, "sampler of Loading is a list_iterator, which can be read once"),
        (
            {"sampler": DistributedSampler(range(10), num_replicas=2, rank=0)},  # type: ignore[arg-type]
            "sampler of Loading is a DistributedSampler for 2 workers: give one for the whole dataset",
        ),
    ],
)
def test_values_that_are_refused(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(WorkloadError, match=words):
        Loading(**fields)


class Nothing(Dataset[Any]):
    """Has neither way to be read."""


class NoLength(Dataset[Any]):
    def __getitem__(self, index: int) -> int:
        return index


def held_out(dataset: Any, name: str = "") -> Evaluation:
    return Evaluation(dataset=dataset, metric="m", measure=lambda output, batch: output, name=name)


def workload(dataset: Any, **fields: Any) -> Workload:
    return Workload(
        name="w",
        model=lambda: torch.nn.Linear(1, 1),
        dataset=dataset,
        inputs=lambda batch: batch,
        loss=lambda output, batch: output.mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        **{"batch_size": 4, **fields},
    )


@pytest.mark.parametrize(
    ("dataset", "fields", "words"),
    [
        (
            DataLoader(TensorDataset(torch.arange(3)), batch_size=2),
            {},
            "a DataLoader: give its dataset .* batch_size=2",
        ),
        (Nothing(), {}, "a Nothing, cannot be read: it needs __getitem__ and __len__, or __iter__"),
        (NoLength(), {}, "a NoLength, has __getitem__ but no __len__"),
        ([], {}, "is empty"),
        (3, {}, "a int, cannot be read"),
        ((each for each in range(3)), {"loading": Loading(sampler=[1])}, "is a stream, which has its own order"),
        ([1, 2], {"loading": Loading(drop_last=True)}, "batch_size=4 is more than the 2 samples .* at most 2"),
        ([1, 2], {"loading": Loading(sampler=[2])}, "the sampler gives the index 2"),
        (
            [1, 2],
            {"evaluation": held_out(Nothing())},
            "the held-out dataset of workload 'w', a Nothing, cannot be read",
        ),
        (
            [1, 2],
            {"evaluation": [held_out([1]), held_out(Nothing(), name="other")]},
            "the held-out dataset 'other' of workload 'w', a Nothing, cannot be read",
        ),
    ],
)
def test_data_that_is_refused(dataset: Any, fields: dict[str, Any], words: str) -> None:
    with pytest.raises(DataError, match=words):
        check_data(workload(dataset, **fields))


def test_a_batch_larger_than_the_dataset_is_told() -> None:
    assert Loader(dataset=[1, 2], batch_size=2).notes == ()
    (note,) = Loader(dataset=[1, 2], batch_size=3).notes
    assert note == "batch_size=3 is more than the 2 samples of the dataset: each step takes all of them"
