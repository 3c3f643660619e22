"""Draws of a sample depend on its place in the epoch, not on who reads it, and disturb no other draws."""

from __future__ import annotations

import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset, WeightedRandomSampler

from shardwise.errors import DataError, ShardwiseError
from shardwise.workload.loading import Loading
from shardwise.workload.reading.draws import draw_state, drawing_from
from shardwise.workload.reading.loader import Loader

SAMPLES, BATCH = 22, 8


def drawn(index: int) -> Tensor:
    return torch.tensor([float(index), random.random(), float(np.random.rand())]) + torch.rand(3)


class Augmented(Dataset[Tensor]):
    """Draws from all three generators from sample `first` on."""

    def __init__(self, first: int = 0) -> None:
        self.first = first

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        return drawn(index) if index >= self.first else torch.full((3,), float(index))


class Together(Augmented):
    """Is asked for several samples at once."""

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        return [self[index] for index in indices]


class Stream(IterableDataset[Tensor]):
    def __iter__(self) -> Iterator[Tensor]:
        order = list(range(SAMPLES))
        random.shuffle(order)
        yield from map(drawn, order)


def noisy(samples: list[Tensor]) -> Tensor:
    batch = torch.stack(samples)
    return batch + torch.rand(batch.shape)


def batches(loader: Loader, replicas: int, start: int = 0, epoch: int = 1) -> list[Tensor]:
    """Global batches, put together from those of the replicas."""
    parts = [list(replace(loader, replica=r, parts=(1,) * replicas).shares(epoch, start)) for r in range(replicas)]
    return [
        torch.cat([m.data[: m.samples] for share in shares for m in share.microbatches])
        for shares in zip(*parts, strict=True)
    ]


KINDS = {
    "plain": Loader(dataset=Augmented(SAMPLES), batch_size=BATCH),
    "drawing": Loader(dataset=Augmented(), batch_size=BATCH),
    "late": Loader(dataset=Augmented(SAMPLES - 1), batch_size=BATCH, loading=Loading(shuffle=False)),
    "together": Loader(dataset=Together(), batch_size=BATCH),
    "stream": Loader(dataset=Stream(), batch_size=BATCH),
    "collate": Loader(dataset=Augmented(), batch_size=BATCH, collate=noisy),
    "weighted": Loader(
        dataset=Augmented(),
        batch_size=BATCH,
        loading=Loading(sampler=WeightedRandomSampler([1.0] * SAMPLES, SAMPLES, generator=torch.Generator())),
    ),
}


@pytest.mark.parametrize("kind", KINDS)
def test_equal_for_any_number_of_replicas_and_from_any_batch_on(kind: str) -> None:
    alone = batches(KINDS[kind], 1)
    assert [len(batch) for batch in alone] == [8, 8, 6]
    for replicas, start in ((2, 0), (3, 0), (2, 1), (1, 2)):
        found = batches(KINDS[kind], replicas, start)
        assert all(torch.equal(a, b) for a, b in zip(found, alone[start:], strict=True)), (replicas, start)


def loading_processes() -> list[Any]:
    """Loading processes that are still there; the test session may keep workers of its own."""
    return [child for child in multiprocessing.active_children() if type(child).__name__ != "ForkServerProcess"]


@pytest.mark.parametrize("kind", KINDS)
def test_equal_with_loading_processes(kind: str) -> None:
    alone = KINDS[kind]
    beside = replace(alone, loading=replace(alone.loading, processes=2))
    for start in (0, 1):
        pairs = zip(batches(beside, 1, start), batches(alone, 1, start), strict=True)
        assert all(torch.equal(a, b) for a, b in pairs)
    assert loading_processes() == []


@pytest.mark.parametrize("kind", ["drawing", "stream", "collate", "weighted"])
def test_others_draw_as_if_nothing_had_been_read(kind: str) -> None:
    for processes in (0, 1):
        loader = KINDS[kind]
        before = draw_state()
        for _ in replace(loader, loading=replace(loader.loading, processes=processes)).shares(0):
            assert draw_state() == before


def test_epochs_and_repeated_samples_draw_anew() -> None:
    loader = KINDS["drawing"]
    first, second = (torch.cat(batches(loader, 1, epoch=epoch)) for epoch in (0, 1))
    assert len({*map(tuple, first.tolist()), *map(tuple, second.tolist())}) == 2 * SAMPLES
    twice = replace(loader, loading=Loading(sampler=[3] * 8))
    assert len(set(map(tuple, batches(twice, 1)[0].tolist()))) == 8


def test_a_collate_that_draws_must_return_what_can_be_cut() -> None:
    loader = Loader(dataset=Augmented(), batch_size=BATCH, collate=lambda samples: torch.rand(3))
    with pytest.raises(DataError, match=r"collate draws .* a tensor of shape \(3,\), which cannot be cut"):
        next(loader.shares(0))


def test_the_block_restores_the_generators() -> None:
    before = draw_state()
    found = []
    for key in ((1, 2), (1, 2), (2, 1)):
        with drawing_from(*key):
            found.append((random.random(), np.random.rand(), torch.rand(1).item()))
    assert found[0] == found[1] != found[2]
    assert draw_state() == before


class Broken(Augmented):
    def __getitem__(self, index: int) -> Tensor:
        raise KeyError(f"no sample {index}")


class Leaving(Augmented):
    def __getitem__(self, index: int) -> Tensor:
        import os

        os._exit(3)


@pytest.mark.parametrize(
    ("dataset", "words"),
    [
        (Broken(), r"a loading process could not read its samples: KeyError: 'no sample \d+' \(.*test_draws.py, line"),
        (Leaving(), r"a loading process has ended: "),
    ],
)
def test_a_loading_process_that_fails(dataset: Any, words: str) -> None:
    loader = Loader(dataset=dataset, batch_size=BATCH, loading=Loading(processes=1))
    with pytest.raises(ShardwiseError, match=words):
        list(loader.shares(0))
    assert loading_processes() == []
