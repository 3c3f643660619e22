"""Report of a worker on what it has read of a batch, for a comparison with the other workers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from shardwise.workload.reading.facts import Facts

FAILED = -1
"""Number of samples that stands for samples that a worker could not read."""

Named = Sequence[tuple[str, Facts]]


@dataclass(frozen=True, slots=True)
class Seen:
    """Report of what a worker has read of a global batch, for a comparison with other workers.

    Attributes:
        samples: number of samples of the batch; 0 at the end of a stream, FAILED if they cannot be read.
        everybody: names and facts of samples that all workers have read, in order.
        replica: index of the worker's replica.
        peers: names and facts of samples and microbatches that the workers of this replica have read.
        why: reason why samples cannot be read; empty otherwise.
        stream: whether it is a batch of a stream.
    """

    samples: int
    everybody: Named = ()
    replica: int = 0
    peers: Named = ()
    why: str = ""
    stream: bool = True

    @classmethod
    def of_order(cls, epoch: int, batches: Sequence[Sequence[int]]) -> Seen:
        """Return the order of an epoch in place of samples."""
        orders = {f"batch {number}": str(list(batch)) for number, batch in enumerate(batches)}
        return cls(sum(map(len, batches)), ((f"the sampler's epoch {epoch}", orders),), stream=False)
