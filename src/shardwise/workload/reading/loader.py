"""Loading of one replica's shares of the batches of an epoch, beside the training: by a thread or by processes.

A dataset may draw random numbers from the global generators of Python, numpy and torch. They are seeded for each sample
by its place in the epoch, so every worker, and one process alone, draws the same. The model draws from them too, so a
dataset that draws is not read while a step runs, unless processes of its own read it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch

from shardwise.errors import DataError
from shardwise.workload.data import Microbatch, Share, batch_samples, cut_batch, is_map_style, take
from shardwise.workload.reading.failure import where
from shardwise.workload.reading.order import EvenBatches, epoch_batches
from shardwise.workload.reading.processes import LoadingProcesses
from shardwise.workload.reading.reader import IndexReader, Loaded, Reader, ReadingPlan, StreamReader
from shardwise.workload.reading.seen import FAILED, Seen

_OPEN: set[ThreadPoolExecutor] = set()
"""Pools in use. Garbage collection would end the thread of any other before it closes a generator that waits for it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loader(ReadingPlan):
    """Loader of one replica's shares of the batches of an epoch; it reads only this replica's samples.

    Attributes:
        enter: called first in each loading process.
    """

    enter: Callable[[], None] | None = None

    @property
    def batches(self) -> int | None:
        """Steps per epoch. None for an iterable dataset of unknown length, and for a function of the epoch."""
        chooser = self.loading.chooser
        if not hasattr(self.dataset, "__len__") or (chooser is not None and not hasattr(chooser, "__iter__")):
            return None
        if chooser is not None:
            return len(self._order(0))
        return len(EvenBatches(range(len(self.dataset)), self.batch_size, self.loading.drop_last))

    @property
    def notes(self) -> tuple[str, ...]:
        """Return what the user should know, one line each."""
        count = len(self.dataset) if hasattr(self.dataset, "__len__") else None
        if count is None or self.loading.chooser is not None or count >= self.batch_size:
            return ()
        size = f"batch_size={self.batch_size}"
        return (f"{size} is more than the {count} samples of the dataset: each step takes all of them",)

    def shares(self, epoch: int, start: int = 0) -> Iterator[Share]:
        """Yield this replica's shares of an epoch from batch `start` on; the next one is loaded meanwhile.

        Raises:
            DataError: the dataset is empty, or a sampler gives something else than its indices.
        """
        reader = self._reader(epoch, start)
        count = self.loading.processes
        source: Reader | LoadingProcesses = LoadingProcesses(reader, count, self.enter) if count else reader
        pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="shardwise-loader")
        _OPEN.add(pool)
        _compute_alone(pool)
        thread = pool.submit(threading.get_ident).result()
        try:
            loaded = self._agreed(reader, pool.submit(source.first).result)
            while loaded is not None and loaded.share is not None:
                pending = None if source.draws else pool.submit(source.beside)
                yield loaded.share
                loaded = None if pending is None else self._agreed(reader, pending.result)
                if loaded is None:  # it draws, as has been seen before or just now
                    loaded = self._agreed(reader, pool.submit(source.apart).result)
        finally:
            if within := threading.get_ident() == thread:  # it collects garbage, and cannot wait for itself
                source.close()
            else:
                pool.submit(source.close).result()
            pool.shutdown(wait=not within)
            _OPEN.discard(pool)

    def first(self, epoch: int, start: int = 0) -> Share | None:
        """Return the share of batch `start` of an epoch, without reading ahead. Returns None past the last batch.

        Raises:
            DataError: the other workers read something else, if `agree` compares.
        """
        reader = self._reader(epoch, start)
        loaded = self._agreed(reader, reader.first)
        return None if loaded is None else loaded.share

    def _reader(self, epoch: int, start: int) -> IndexReader | StreamReader:
        if not is_map_style(self.dataset):
            return StreamReader(self, epoch, start)
        if len(self.dataset) == 0:
            raise DataError("the dataset is empty: there is nothing to train on")
        if callable(tell := getattr(self.dataset, "set_epoch", None)):
            tell(epoch)
        order = self._order(epoch)
        if self.agree is not None and self.loading.chooser is not None:
            self.agree(Seen.of_order(epoch, order))
        return IndexReader(self, epoch, start, order)

    def _order(self, epoch: int) -> Sequence[Sequence[int]]:
        return epoch_batches(len(self.dataset), self.batch_size, self.loading, self.seed, epoch)

    def _agreed(self, reader: Reader, read: Callable[[], Loaded | None]) -> Loaded | None:
        """Read a batch, and check that the other workers read theirs from the same data.

        It is called for batches that are asked for, which all workers ask for alike. One that was read ahead may never
        be, and whether a worker reads ahead is for it to decide.
        """
        try:
            loaded = read()
        except Exception as error:
            if self.agree is not None and reader.streams:
                with suppress(Exception):  # this worker's own error is the one to raise
                    self.agree(Seen(FAILED, why=where(error)))
            raise
        if loaded is not None and self.agree is not None and loaded.seen is not None:
            self.agree(loaded.seen)
        return loaded


def share_of(batch: Any, loader: Loader) -> Share:
    """Cut a global batch, which is the same on every worker, into the share of `loader`'s replica."""
    samples = batch_samples(batch)
    rows = cut_batch(samples, loader.parts, loader.microbatches, uniform=loader.uniform)
    cells = [row[loader.replica] for row in rows]
    return Share(tuple(Microbatch(take(batch, c if len(c) else range(1)), len(c), c.start) for c in cells), samples)


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
