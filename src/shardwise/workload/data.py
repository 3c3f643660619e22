"""Distribution of samples: the order of an epoch, and how a global batch is cut into shares and microbatches.

The order depends only on the seed and the epoch, never on the number of workers. Step n has the same samples under
every strategy, and each sample is seen exactly once per epoch. A smaller last batch is cut as evenly as possible.
A global batch is first cut into microbatches (rows), and each row into replicas (cells), equally or in given parts:

    batch of 8, 2 microbatches, 2 replicas        row 0: [0 1 | 2 3]    row 1: [4 5 | 6 7]
    the same, parts of 3 and 1                    row 0: [0 1 2 | 3]    row 1: [4 5 6 | 7]
"""

from __future__ import annotations

import itertools
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate

from shardwise.errors import DataError

FAILED = -1
"""Sent to the other workers in place of a number of samples if a worker cannot read its samples."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Samples that go through the model together on one replica.

    Attributes:
        data: collated samples; if `samples` is 0, one sample that only keeps the replica in step with the others.
        samples: number of samples that count; 0 if the replica has none of a small last batch.
        first: position of the first sample in the global batch. Random numbers drawn for a sample depend on this
            position, not on the worker.
    """

    data: Any
    samples: int
    first: int


@dataclass(frozen=True, slots=True)
class Share:
    """Microbatches of one replica in one step, and the number of samples of all replicas together."""

    microbatches: tuple[Microbatch, ...]
    samples: int


def cut_batch(samples: int, parts: Sequence[int], microbatches: int, *, uniform: bool = False) -> list[list[range]]:
    """Cut the positions of a batch of `samples` into rows of microbatches, each with one range per replica.

    A replica gets a fraction of each row in proportion to its entry in `parts`. With `uniform`, all cells of a replica
    have one size, because a pipeline's shapes are fixed; the remainder goes into rows of one sample per replica at the
    end. Cells without a sample are empty ranges.

        >>> cut_batch(8, [1, 1], 2)
        [[range(0, 2), range(2, 4)], [range(4, 6), range(6, 8)]]
        >>> cut_batch(8, [3, 1], 1)
        [[range(0, 6), range(6, 8)]]
        >>> cut_batch(5, [1, 1], 2, uniform=True)
        [[range(0, 1), range(1, 2)], [range(2, 3), range(3, 4)], [range(4, 5), range(5, 5)]]
    """
    replicas, even_rows = len(parts), [1] * microbatches
    if not uniform:
        return [_split(row, parts) for row in _split(range(samples), even_rows)]
    size = samples // (sum(parts) * microbatches)
    even = size * sum(parts) * microbatches
    rows = [_split(row, parts) for row in _split(range(even), even_rows)] if size else []
    rows += [
        [range(min(start + r, samples), min(start + r + 1, samples)) for r in range(replicas)]
        for start in range(even, samples, replicas)
    ]
    return rows


def _split(whole: range, parts: Sequence[int]) -> list[range]:
    """Cut a range in proportion to `parts`; the remainder goes where most is lacking, to earlier parts first."""
    total = sum(parts)
    sizes = [len(whole) * part // total for part in parts]
    lacking = sorted(range(len(parts)), key=lambda n: sizes[n] - len(whole) * parts[n] / total)
    for number in lacking[: len(whole) - sum(sizes)]:
        sizes[number] += 1
    ends = itertools.accumulate(sizes, initial=whole.start)
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """Return the permutation of one epoch, which is the same on every machine and for every number of workers."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(samples, generator=generator).tolist()
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Loader of one replica's shares of the batches of an epoch; it reads only this replica's samples.

    Attributes:
        dataset: map-style or iterable dataset. An iterable one has its own order and is read completely by every
            replica.
        batch_size: samples per step of all replicas together.
        collate: function from a list of samples to a batch. None means torch's default.
        seed: seed of the order.
        shuffle: whether each epoch has a new order (map-style only).
        replica: index of this replica.
        parts: relative share of a batch for each replica.
        microbatches: rows per batch.
        uniform: whether shapes are fixed, see `cut_batch`.
        agree: called for each global batch of an iterable dataset before it is used, with its number of samples (0 at
            the end) or with `FAILED` and the error. It raises if other workers read another number. None means no
            check.
        limit: largest number of samples to read of each batch, from its start. None reads whole batches.
    """

    dataset: Any
    batch_size: int
    collate: Callable[[list[Any]], Any] | None = None
    seed: int = 0
    shuffle: bool = True
    replica: int = 0
    parts: tuple[int, ...] = (1,)
    microbatches: int = 1
    uniform: bool = False
    agree: Callable[[int, str], None] | None = None
    limit: int | None = None

    @property
    def batches(self) -> int | None:
        """Steps per epoch. None for an iterable dataset of unknown length."""
        return -(-len(self.dataset) // self.batch_size) if hasattr(self.dataset, "__len__") else None

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Yield this replica's shares of an epoch from batch `start` on; a background thread loads the next one."""
        source = self._source(epoch, start)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardwise-loader") as pool:
            _compute_alone(pool)
            pending = pool.submit(next, source, None)
            while (share := pending.result()) is not None:
                pending = pool.submit(next, source, None)
                yield share

    def first(self, epoch: int, start: int = 0) -> Share | None:
        """Return the share of batch `start` of an epoch, without reading ahead. Returns None past the last batch."""
        return next(self._source(epoch, start), None)

    def _source(self, epoch: int, start: int) -> Iterator[Share]:
        return self._mapped(epoch, start) if is_map_style(self.dataset) else self._streamed(start)

    def _mapped(self, epoch: int, start: int) -> Iterator[Share]:
        count = len(self.dataset)
        if count == 0:
            raise DataError("the dataset is empty: there is nothing to train on")
        order = epoch_order(count, self.seed, epoch) if self.shuffle else list(range(count))
        for first in range(start * self.batch_size, count, self.batch_size):
            indices = order[first : first + self.batch_size]
            yield self._share(indices, self._fetch)

    def _streamed(self, start: int) -> Iterator[Share]:
        stream = iter(self.dataset)
        for _ in itertools.islice(stream, start * self.batch_size):
            pass
        while samples := self._read(stream):
            yield self._share(samples, list)

    def _read(self, stream: Iterator[Any]) -> list[Any]:
        """Read the samples of the next global batch, and check that all workers read equally many."""
        agree = self.agree or (lambda samples, why: None)
        try:
            samples = list(itertools.islice(stream, self.batch_size))
        except Exception as error:
            with suppress(Exception):  # this worker's own error is the one to raise
                agree(FAILED, _where(error))
            raise
        agree(len(samples), "")
        return samples

    def _fetch(self, indices: list[int]) -> list[Any]:
        fetch_many = getattr(self.dataset, "__getitems__", None)
        return list(fetch_many(indices)) if fetch_many else [self.dataset[i] for i in indices]

    def _share(self, batch: list[Any], fetch: Callable[[list[Any]], list[Any]]) -> Share:
        collate = self.collate or default_collate
        batch = batch[: self.limit]
        rows = cut_batch(len(batch), self.parts, self.microbatches, uniform=self.uniform)
        cells = [row[self.replica] for row in rows]
        loaded = [collate(fetch([batch[i] for i in cell] or batch[:1])) for cell in cells]
        return Share(tuple(Microbatch(d, len(c), c.start) for d, c in zip(loaded, cells, strict=True)), len(batch))


def _where(error: Exception) -> str:
    """Format an error and the place that raised it in one line, for workers that do not have its traceback."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({frame.filename}, line {frame.lineno})"


def _compute_alone(pool: ThreadPoolExecutor) -> None:
    """Restrict a pool's thread to one compute thread, so that it does not slow down the model's threads.

    OpenMP counts the threads of a process over all teams. If they exceed the cores, it puts threads to sleep as soon as
    they wait, and every kernel of the model has to wake them, which makes a step take a fifth longer.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return

    def alone() -> None:
        torch.get_num_threads()  # the first query copies the global number; from then on the thread has its own
        torch.set_num_threads(1)

    pool.submit(alone).result()
    torch.set_num_threads(threads)  # restores MKL's global number, and the number for threads that start later


def is_map_style(dataset: Any) -> bool:
    """Return whether samples are read by index; `IterableDataset` also has a `__getitem__`, but it raises."""
    return hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def first_samples(dataset: Any, count: int) -> list[Any] | None:
    """Return the first samples in the dataset's own order.

    Returns None if reading them would use up an iterable that can be read only once.
    """
    if is_map_style(dataset):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    return None if iter(dataset) is dataset else list(itertools.islice(dataset, count))


def batch_samples(batch: Any) -> int:
    """Return the number of samples in a batch, which is the size of the first dimension of its first tensor.

    Raises:
        DataError: the batch holds no tensor.
    """
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise DataError(f"a batch must hold tensors with samples along the first dimension, not {type(batch).__name__}")


def take(batch: Any, cell: range) -> Any:
    """Slice the samples `cell` out of a global batch, along the first dimension of every tensor."""

    def cut(leaf: Any) -> Any:
        return leaf[cell.start : cell.stop] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    return torch.utils._pytree.tree_map(cut, batch)


def share_of(batch: Any, loader: Loader) -> Share:
    """Cut a global batch, which is the same on every worker, into the share of `loader`'s replica."""
    samples = batch_samples(batch)
    rows = cut_batch(samples, loader.parts, loader.microbatches, uniform=loader.uniform)
    cells = [row[loader.replica] for row in rows]
    return Share(tuple(Microbatch(take(batch, c if len(c) else range(1)), len(c), c.start) for c in cells), samples)
