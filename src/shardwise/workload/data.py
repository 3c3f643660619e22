"""Which sample goes where: the order of an epoch, and how a global batch is cut into shares and microbatches.

The order depends on the seed and the epoch alone, never on the number of workers: the same samples make up step n
under every strategy, each sample is seen exactly once per epoch, and a last, smaller batch is cut as evenly as it can
be.
A global batch is first cut into microbatches (rows), each row into replicas (cells), of one size or in given parts:

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
"""Told in place of a number of samples where they cannot be read."""


@dataclass(frozen=True, slots=True)
class Microbatch:
    """Samples that go through the model together on one replica.

    `samples` is 0 where a replica has none of a small last batch: `data` is then one sample that only keeps the
    replica in step with the others and counts for nothing. `first` is the position of its first sample in the global
    batch: what is drawn at random for a sample depends on that position, not on the worker.
    """

    data: Any
    samples: int
    first: int


@dataclass(frozen=True, slots=True)
class Share:
    """What one replica does in one step, and how many samples all replicas have together."""

    microbatches: tuple[Microbatch, ...]
    samples: int


def cut_batch(samples: int, parts: Sequence[int], microbatches: int, *, uniform: bool = False) -> list[list[range]]:
    """Positions of a batch of `samples`: rows of microbatches, each with one range per replica.

    `parts` is what each replica has of a row. With `uniform` all cells of a replica have one size (a pipeline's shapes
    are fixed): what does not divide goes into rows of one sample per replica at the end. Cells without a sample are
    empty ranges.

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
    """Cuts a range in proportion to `parts`; what is left over goes to those that lack most, the first ones first."""
    total = sum(parts)
    sizes = [len(whole) * part // total for part in parts]
    lacking = sorted(range(len(parts)), key=lambda n: sizes[n] - len(whole) * parts[n] / total)
    for number in lacking[: len(whole) - sum(sizes)]:
        sizes[number] += 1
    ends = itertools.accumulate(sizes, initial=whole.start)
    return [range(start, end) for start, end in itertools.pairwise(ends)]


def epoch_order(samples: int, seed: int, epoch: int) -> list[int]:
    """The permutation of one epoch: the same on every machine and for every number of workers."""
    generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
    order: list[int] = torch.randperm(samples, generator=generator).tolist()
    return order


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader:
    """Loads this replica's shares of the batches of an epoch; only its own samples are read.

    Attributes:
        dataset: map-style or iterable. An iterable one keeps its own order and is read through by every replica.
        batch_size: global samples per step.
        collate: list of samples -> batch; None: torch's default.
        seed: of the order.
        shuffle: a fresh order in each epoch (map-style only).
        replica: which share is ours.
        parts: of a batch, one for each replica.
        microbatches: rows per batch.
        uniform: fixed shapes, see `cut_batch`.
        agree: called with the number of samples of each global batch of a stream before it is given, 0 at the end, or
            `FAILED` and why: it raises where other workers read another number. None: nobody is asked.
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

    @property
    def batches(self) -> int | None:
        """Steps per epoch; None for an iterable dataset of unknown length."""
        return -(-len(self.dataset) // self.batch_size) if hasattr(self.dataset, "__len__") else None

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Shares of epoch `epoch` from batch `start` on, for our replica; the next one loads while one is used."""
        source = self._mapped(epoch, start) if is_map_style(self.dataset) else self._streamed(start)
        with ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardwise-loader") as pool:
            _compute_alone(pool)
            pending = pool.submit(next, source, None)
            while (share := pending.result()) is not None:
                pending = pool.submit(next, source, None)
                yield share

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
        """The samples of the next global batch, as many on all workers."""
        agree = self.agree or (lambda samples, why: None)
        try:
            samples = list(itertools.islice(stream, self.batch_size))
        except Exception as error:
            with suppress(Exception):  # this worker's own error is the one to tell
                agree(FAILED, _where(error))
            raise
        agree(len(samples), "")
        return samples

    def _fetch(self, indices: list[int]) -> list[Any]:
        fetch_many = getattr(self.dataset, "__getitems__", None)
        return list(fetch_many(indices)) if fetch_many else [self.dataset[i] for i in indices]

    def _share(self, batch: list[Any], fetch: Callable[[list[Any]], list[Any]]) -> Share:
        collate = self.collate or default_collate
        rows = cut_batch(len(batch), self.parts, self.microbatches, uniform=self.uniform)
        cells = [row[self.replica] for row in rows]
        loaded = [collate(fetch([batch[i] for i in cell] or batch[:1])) for cell in cells]
        return Share(tuple(Microbatch(d, len(c), c.start) for d, c in zip(loaded, cells, strict=True)), len(batch))


def _where(error: Exception) -> str:
    """An error in one line, with the place that raised it: other workers have no traceback of it."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    message = " ".join(str(error).split())
    return f"{type(error).__name__}: {message} ({frame.filename}, line {frame.lineno})"


def _compute_alone(pool: ThreadPoolExecutor) -> None:
    """Keeps the thread of a pool from computing with threads of its own, beside those of the model.

    OpenMP knows how many threads a process has in all teams; where these are more than there are cores, it puts threads
    to sleep as soon as they wait, and every kernel of the model has to wake them: a step takes a fifth longer then.
    """
    threads = torch.get_num_threads()
    if threads == 1:
        return

    def alone() -> None:
        torch.get_num_threads()  # a thread takes the number for all when it first asks; from then on it has its own
        torch.set_num_threads(1)

    pool.submit(alone).result()
    torch.set_num_threads(threads)  # what MKL has for all threads, and threads that start later


def is_map_style(dataset: Any) -> bool:
    """Whether samples are read by index; torch's `IterableDataset` has a `__getitem__` too, which raises."""
    return hasattr(dataset, "__getitem__") and not isinstance(dataset, IterableDataset)


def first_samples(dataset: Any, count: int) -> list[Any] | None:
    """The first samples in the dataset's own order; None where that would use up an iterable that is read only once."""
    if is_map_style(dataset):
        return [dataset[index] for index in range(min(count, len(dataset)))]
    return None if iter(dataset) is dataset else list(itertools.islice(dataset, count))


def batch_samples(batch: Any) -> int:
    """Samples in a batch: the size of the first dimension of its tensors.

    Raises:
        DataError: the batch holds no tensor.
    """
    for leaf in torch.utils._pytree.tree_leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.dim():
            return int(leaf.shape[0])
    raise DataError(f"a batch must hold tensors with samples along the first dimension, not {type(batch).__name__}")


def take(batch: Any, cell: range) -> Any:
    """The samples `cell` of a global batch, every tensor of it cut along its first dimension."""

    def cut(leaf: Any) -> Any:
        return leaf[cell.start : cell.stop] if isinstance(leaf, torch.Tensor) and leaf.dim() else leaf

    return torch.utils._pytree.tree_map(cut, batch)


def share_of(batch: Any, loader: Loader) -> Share:
    """Cuts a global batch, the same on every worker, into the share of `loader`'s replica."""
    samples = batch_samples(batch)
    rows = cut_batch(samples, loader.parts, loader.microbatches, uniform=loader.uniform)
    cells = [row[loader.replica] for row in rows]
    return Share(tuple(Microbatch(take(batch, c if len(c) else range(1)), len(c), c.start) for c in cells), samples)
