"""Agreement of all workers on the batches that they read, so that they take the same steps on the same samples."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from shardwise.errors import DataError, ShardwiseError
from shardwise.parallel.data.same_data import ADVICE, by_rank, told
from shardwise.parallel.program import Program
from shardwise.run.control_group import Workers
from shardwise.workload.data import is_map_style
from shardwise.workload.reading.facts import checksum, difference
from shardwise.workload.reading.loader import Loader
from shardwise.workload.reading.seen import FAILED, Seen

SPLIT = (
    "all workers must read the same samples, because each batch is split over them afterwards: take out what splits "
    "the data by rank (RANK, get_rank, split_dataset_by_node)"
)


def agreeing(program: Program) -> Loader:
    """Return the loader of the training data; with it, workers compare what they read. Collective.

    Batches of a stream and orders of a sampler are compared over all workers, batches of a map-style dataset over the
    workers of a replica, which compute the same samples.
    """
    loader, strategy = program.loader(), program.strategy
    alone = is_map_style(loader.dataset) and loader.loading.chooser is None and strategy.replicas == strategy.workers
    if program.mesh.world is None or alone:
        return loader
    return replace(loader, agree=StreamAgreement(program.steps + 1))


class StreamAgreement:
    """Comparison of what all workers have read, see `ReadingPlan.agree`. Creating one is collective.

    It has a process group of its own, so that its messages do not wait for those of the step.

    Args:
        first: number of the first step, from 1.
    """

    def __init__(self, first: int) -> None:
        self._workers = Workers()
        self._step = first

    def begin(self, step: int) -> None:
        """Count the steps again, from number `step`: what was read before was used for no step."""
        self._step = step

    def __call__(self, seen: Seen) -> None:
        """Compare what the workers read for the next step. Collective.

        Raises:
            DataError: workers read different numbers of samples, or different ones.
            ShardwiseError: a worker could not read its samples.
        """
        mine = seen.samples, seen.replica, checksum(seen.everybody), checksum(seen.peers)
        rows = self._workers.numbers(*mine)
        if seen.stream:
            self._check_stream([row[0] for row in rows], seen)
        if len({row[2] for row in rows}) > 1:
            self._tell(seen, list(range(len(rows))), 0)
        for replica in sorted({row[1] for row in rows}):
            ranks = [rank for rank, row in enumerate(rows) if row[1] == replica]
            if len({rows[rank][3] for rank in ranks}) > 1:
                self._tell(seen, ranks, 1)

    def _check_stream(self, counts: list[int], seen: Seen) -> None:
        step, self._step = self._step, self._step + 1
        if FAILED in counts:
            rank, reasons = counts.index(FAILED), self._workers.exchange(seen.why)
            raise ShardwiseError(f"step {step}: rank {rank} could not read its samples: {reasons[rank]}")
        if len(set(counts)) > 1:
            found = by_rank([f"{count} sample{'' if count == 1 else 's'}" for count in counts])
            raise DataError(f"step {step}: the stream of samples gave {found}: all workers must read the same stream")
        if not seen.samples:
            self._step = step  # no step was taken: the next epoch begins with this number

    def _tell(self, seen: Seen, ranks: list[int], which: int) -> None:
        """Find the first difference between the samples of some ranks, and raise it. Collective."""
        texts = self._workers.exchange(json.dumps([seen.everybody, seen.peers]))
        everybodys: list[Any] = [json.loads(texts[rank])[which] for rank in ranks]
        found = difference(everybodys)
        assert found is not None, "checksums differ"
        why = f"{SPLIT}; or {ADVICE}" if which == 0 else f"these workers compute the same samples: {ADVICE}"
        raise DataError(f"{told(found, ranks)}: {why}")
