"""Data comes to the program beside the model, not in its way."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from shardwise.workload.loading import Loading
from shardwise.workload.reading.loader import _OPEN, Loader

SAMPLES = 6


class Watched(Dataset[Tensor]):
    """Notes how many threads torch would compute with where a sample is made."""

    def __init__(self) -> None:
        self.threads: list[int] = []

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Tensor:
        self.threads.append(torch.get_num_threads())
        return torch.full((2,), float(index))


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> Iterator[int]:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def test_samples_are_made_without_threads_of_their_own(threads: int) -> None:
    dataset = Watched()
    loader = Loader(dataset=dataset, batch_size=2, seed=0, loading=Loading(shuffle=False))
    for epoch in range(2):
        for share in loader.shares(epoch):
            assert share.samples == 2
            assert torch.get_num_threads() == threads  # the model keeps its own
            torch.ones(64, 64) @ torch.ones(64, 64)
            assert torch.get_num_threads() == threads
    assert dataset.threads == [1] * 2 * SAMPLES


class Holder:
    """Object in a cycle of references with what it holds."""

    def __init__(self, loader: Loader) -> None:
        self.shares = loader.shares(0)
        self.first = next(self.shares)
        self.itself = self


def test_garbage_collection_closes_what_nobody_reads_to_its_end() -> None:
    ended = threading.Event()

    def collect() -> None:
        Holder(Loader(dataset=Watched(), batch_size=2, loading=Loading(shuffle=False)))
        gc.collect()
        ended.set()

    threading.Thread(target=collect, daemon=True).start()
    assert ended.wait(30), "the generator waits for a thread that has ended"
    assert not _OPEN
