"""Processes that load batches beside the training; they end with the epoch, and with the worker that started them."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, TypeAlias

from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset

from shardwise.errors import DataError, ShardwiseError
from shardwise.workload.reading.failure import where
from shardwise.workload.reading.reader import IndexReader, Loaded, StreamReader

Sent: TypeAlias = "Loaded | ShardwiseError"


class LoadingProcesses:
    """Batches of a reader, read by torch's loading processes in the reader's order and with its draws.

    A stream is read by one process, however many are wanted: its samples come one after the other.

    Args:
        reader: reader whose copies the processes use.
        count: number of processes.
        enter: called first in each process.

    Raises:
        DataError: this system cannot copy a process (`fork`).
    """

    draws = False

    def __init__(self, reader: IndexReader | StreamReader, count: int, enter: Callable[[], None] | None) -> None:
        if "fork" not in multiprocessing.get_all_start_methods():
            raise DataError(f"processes={count} of Loading needs a system that can copy processes: use processes=0")
        self._reader, self._count, self._enter = reader, count, enter
        self._sent: Iterator[Sent] | None = None

    def first(self) -> Loaded:
        """Return the next batch; the first call starts the processes.

        All calls must come from one thread that lives until `close`, and not the main one: there torch would raise the
        end of a process at any line of the training.

        Raises:
            ShardwiseError: a process could not read its samples, or has ended.
        """
        if self._sent is None:
            self._sent = self._start()
        try:
            sent = next(self._sent, Loaded(None))
        except RuntimeError as error:
            reason = str(error).partition("\n")[0].rstrip(".")
            raise ShardwiseError(f"a loading process has ended: {reason} (out of memory? use fewer)") from None
        if isinstance(sent, ShardwiseError):
            raise sent
        return sent

    beside = apart = first

    def close(self) -> None:
        """End the processes now: a later process must not inherit them, because it cannot end them."""
        end = getattr(self._sent, "_shutdown_workers", None)
        if end is not None:
            end()  # dropping the iterator would do so only when its cycle of references is collected
        self._sent = iter(())

    def _start(self) -> Iterator[Sent]:
        reader = self._reader
        return iter(
            DataLoader(
                _Indexed(reader) if isinstance(reader, IndexReader) else _Stream(reader),
                batch_size=None,
                sampler=range(reader.start, len(reader.order)) if isinstance(reader, IndexReader) else None,
                num_workers=1 if reader.streams else self._count,
                collate_fn=_unchanged,
                generator=Generator(),  # else it draws from the generator that the model draws from
                multiprocessing_context="fork",
                worker_init_fn=_Enter(self._enter),
            )
        )


@dataclass(frozen=True)
class _Enter:
    """Function that a loading process calls first."""

    enter: Callable[[], None] | None

    def __call__(self, _: int) -> None:
        if self.enter is not None:
            self.enter()


class _Indexed(Dataset[Sent]):
    """Batches by their number."""

    def __init__(self, reader: IndexReader) -> None:
        self._reader = reader

    def __getitem__(self, number: int) -> Sent:
        self._reader.number = number
        return _read(self._reader)


class _Stream(IterableDataset[Sent]):
    """Batches in the order of their stream."""

    def __init__(self, reader: StreamReader) -> None:
        self._reader = reader

    def __iter__(self) -> Iterator[Sent]:
        while True:
            sent = _read(self._reader)
            yield sent
            if isinstance(sent, ShardwiseError) or sent.share is None:
                return


def _read(reader: IndexReader | StreamReader) -> Sent:
    """Read a batch. Returns the error if that fails, in one line, because a traceback does not travel."""
    try:
        return reader.read(seeded=True)
    except ShardwiseError as error:
        return error
    except Exception as error:
        return ShardwiseError(f"a loading process could not read its samples: {where(error)}")


def _unchanged(value: Any) -> Any:
    return value
