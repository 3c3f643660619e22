"""Agreement of all workers on the batches of a stream, so that no worker starts a step that the others do not take."""

from __future__ import annotations

from shardwise.errors import DataError, ShardwiseError
from shardwise.parallel.data.same_data import by_rank
from shardwise.run.control_group import Workers
from shardwise.workload.data import FAILED


class StreamAgreement:
    """Comparison of the sizes of global batches over all workers, see `Loader.agree`. Creating one is collective.

    The loader calls it from its thread while the previous batch is computed, so it has a process group of its own.

    Args:
        first: number of the first step, from 1.
    """

    def __init__(self, first: int) -> None:
        self._workers = Workers()
        self._step = first

    def __call__(self, samples: int, why: str) -> None:
        """Compare the number of samples that the workers read for the next step. Collective.

        Args:
            samples: number of samples read here; 0 at the end of the stream, FAILED if they cannot be read.
            why: reason why they cannot be read; empty otherwise.

        Raises:
            DataError: workers read different numbers.
            ShardwiseError: a worker could not read its samples.
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
            self._step = step  # no step was taken: the next epoch begins with this number
