"""Order of the samples of an epoch, equal on all workers: drawn from the seed and the epoch, or given by a sampler."""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from operator import index as as_index
from typing import Any, overload

import torch

from shardwise.errors import DataError
from shardwise.workload.loading import Loading
from shardwise.workload.reading.draws import drawing_from

LEAST_MOST, MOST_TIMES = 10_000_000, 1000
"""Indices that a sampler may give in an epoch before it counts as endless: the larger of these many, and of these many
times the dataset."""

ORDER = -2
"""Second part of the key that seeds the draws of a sampler; batches have 0 or more in this place."""


def epoch_order(samples: int, seed: int, epoch: int) -> array[int]:
    """Return the permutation of one epoch, which is the same on every machine and for every number of workers.

    It is an array, because every worker holds it: a list takes 44 bytes a sample instead of 4 (8 from 2^31 on).
    """
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order = torch.randperm(samples, generator=generator)
    short = samples <= torch.iinfo(torch.int32).max
    return array("i" if short else "q", (order.int() if short else order).numpy().tobytes())


@dataclass(frozen=True, slots=True)
class EvenBatches(Sequence[Sequence[int]]):
    """Batches of `batch_size` samples each, in the given order; the last one may have fewer.

    Attributes:
        order: indices of the samples.
        batch_size: samples of a batch.
        drop_last: whether to leave out a last batch of fewer samples.
    """

    order: Sequence[int]
    batch_size: int
    drop_last: bool = False

    def __len__(self) -> int:
        full, rest = divmod(len(self.order), self.batch_size)
        return full + (rest > 0 and not self.drop_last)

    @overload
    def __getitem__(self, index: int) -> Sequence[int]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Sequence[int]]: ...
    def __getitem__(self, index: int | slice) -> Sequence[int] | Sequence[Sequence[int]]:
        numbers = range(len(self))[index]
        return self._batch(numbers) if isinstance(numbers, int) else [self._batch(number) for number in numbers]

    def _batch(self, number: int) -> list[int]:
        return list(self.order[number * self.batch_size : (number + 1) * self.batch_size])


def epoch_batches(samples: int, batch_size: int, loading: Loading, seed: int, epoch: int) -> Sequence[Sequence[int]]:
    """Return the indices of each global batch of an epoch.

    Raises:
        DataError: a sampler gives something else than indices of the dataset's `samples` samples, or gives none.
    """
    if loading.chooser is None:
        order = epoch_order(samples, seed, epoch) if loading.shuffle else range(samples)
        return EvenBatches(order, batch_size, loading.drop_last)
    with drawing_from(seed, ORDER, epoch):
        chosen = _chosen(loading.chooser, seed, epoch)
        if loading.batch_sampler is None:
            found = list(_indices("the sampler", chosen, samples))
            batches: Sequence[Sequence[int]] = EvenBatches(found, batch_size, loading.drop_last)
        else:
            batches = list(_lists(chosen, samples))
    if not batches:
        what = "sampler" if loading.batch_sampler is None else "batch sampler"
        raise DataError(f"the {what} gave no batch in epoch {epoch}: there is nothing to train on")
    return batches


def _chosen(chooser: Any, seed: int, epoch: int) -> Any:
    """Return what a sampler gives in an epoch; a generator of its own is seeded, so that resumed runs draw the same."""
    if not hasattr(chooser, "__iter__"):
        chooser = chooser(epoch)
        if not hasattr(chooser, "__iter__"):
            raise DataError(f"the sampler returned {chooser!r} for epoch {epoch}: it must return indices")
    for sampler in (chooser, getattr(chooser, "sampler", None)):
        if isinstance(generator := getattr(sampler, "generator", None), torch.Generator):
            generator.manual_seed(seed * 1_000_003 + epoch)
        if callable(tell := getattr(sampler, "set_epoch", None)):
            tell(epoch)
    return chooser.tolist() if hasattr(chooser, "tolist") else chooser


def _lists(chosen: Iterable[Any], samples: int) -> Iterator[list[int]]:
    """Yield the lists of a batch sampler after a check of each."""
    for number, batch in enumerate(islice(chosen, _most(samples))):
        if not hasattr(batch, "__iter__"):
            raise DataError(f"batch {number} of the batch sampler is {batch!r}: it must be a list of indices")
        indices = list(_indices(f"batch {number} of the batch sampler", batch, samples))
        if not indices:
            raise DataError(f"batch {number} of the batch sampler is empty: it must have an index at least")
        yield indices


def _indices(who: str, chosen: Iterable[Any], samples: int) -> Iterator[int]:
    """Yield the indices in `chosen` as whole numbers after a check of each. `who` gives them, for the message."""
    for count, each in enumerate(chosen):
        if count == _most(samples):
            raise DataError(f"{who} has given {count:,} indices and goes on: it must end, once per epoch")
        try:
            index = as_index(each)
        except TypeError:
            raise DataError(f"{who} gives {each!r}: it must give indices of the dataset, whole numbers") from None
        if not 0 <= index < samples:
            raise DataError(f"{who} gives the index {index}: the dataset has {samples} samples, 0 to {samples - 1}")
        yield index


def _most(samples: int) -> int:
    return max(LEAST_MOST, MOST_TIMES * samples)
