"""Agrees on how much each worker reads of a stream, so that none enters a step that the others do not take."""

from __future__ import annotations

from shardwise.errors import DataError, ShardwiseError
from shardwise.parallel.same_data import by_rank
from shardwise.run.workers import Workers
from shardwise.workload.data import FAILED


class StreamAgreement:
    """Compares the sizes of global batches over all workers, see `Loader.agree`. Creating one is collective.

    The loader calls it from its thread while the batch before is computed, on a group that nothing else uses.

    Args:
        first: number of the first step, from 1.
    """

    def __init__(self, first: int) -> None:
        self._workers = Workers()
        self._step = first

    def __call__(self, samples: int, why: str) -> None:
        """Take the number of samples that were read for the next step, or why there are none. Collective.

        Raises:
            DataError: other workers read another number.
            ShardwiseError: one of them could not read its samples.
        """
        step, self._step = self._step, self._step + 1
        counts = self._workers.numbers(samples)
        if FAILED in counts:
            rank, reasons = counts.index(FAILED), self._workers.exchange(why)
            raise ShardwiseError(f"step {step}: rank {rank} could not read its samples: {reasons[rank]}")
        if len(set(counts)) > 1:
            found = by_rank([f"{count} sample{'' if count == 1 else 's'}" for count in counts])
            raise DataError(f"step {step}: the stream of samples gave {found}: all workers must read the same stream")
        if not samples:
            self._step = step  # the next epoch begins with it
