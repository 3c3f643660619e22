"""Reading of the batches of an epoch, one after the other: samples by index or from a stream, and their collation.

Draws of a sample are keyed by (seed, epoch, batch, position in the batch), those of `collate` by (seed, epoch, batch).
A `collate` that draws gets the whole batch, which is cut afterwards: what it draws would else depend on the cut.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves
from torch.utils.data import default_collate

from shardwise.errors import DataError
from shardwise.workload.data import Microbatch, Share, cut_batch, take
from shardwise.workload.loading import Loading
from shardwise.workload.reading.draws import draw_state, drawing_from, restore_draws, seed_draws
from shardwise.workload.reading.facts import Facts, facts_of
from shardwise.workload.reading.seen import Named, Seen

COLLATE = -1
"""Last part of the key that seeds the draws of `collate`; samples have 0 or more in this place."""

TRIED = 16
"""Number of samples of a batch that are looked at one by one for draws; a later one is noticed after its batch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReadingPlan:
    """Part of a dataset that one replica reads, and in which order.

    Attributes:
        dataset: map-style or iterable dataset. An iterable one has its own order and is read completely by every
            replica.
        batch_size: samples per step of all replicas together.
        collate: function from a list of samples to a batch. None means torch's default.
        seed: seed of the order and of what samples draw.
        loading: choice and order of samples, and number of loading processes.
        replica: index of this replica.
        parts: relative share of a batch for each replica.
        microbatches: rows per batch.
        uniform: whether shapes are fixed, see `cut_batch`.
        agree: called with what was read for each batch before it is used, and with the order of an epoch that a sampler
            gives. It raises if other workers read something else. None means no check.
        limit: largest number of samples to use of each batch, from its start. None uses whole batches.
    """

    dataset: Any
    batch_size: int
    collate: Callable[[list[Any]], Any] | None = None
    seed: int = 0
    loading: Loading = field(default_factory=Loading)
    replica: int = 0
    parts: tuple[int, ...] = (1,)
    microbatches: int = 1
    uniform: bool = False
    agree: Callable[[Seen], None] | None = None
    limit: int | None = None


@dataclass(frozen=True, slots=True)
class Loaded:
    """Batch that was loaded: the share of this replica (None at the end), and what to compare (None: nothing)."""

    share: Share | None
    seen: Seen | None = None


class Reader:
    """Reader of the batches of an epoch. It is used by one thread or process at a time.

    Attributes:
        streams: whether the samples come from a stream, of which every worker reads all.
        draws: whether samples or `collate` were seen to draw random numbers.
    """

    streams = False

    def __init__(self, plan: ReadingPlan, epoch: int, start: int) -> None:
        self.plan, self.epoch, self.start, self.number = plan, epoch, start, start
        self.draws = False
        self._whole = False
        self._collate: Callable[[list[Any]], Any] = plan.collate or default_collate

    def first(self) -> Loaded:
        """Read the first batch while no step runs, and find out whether it draws."""
        raise NotImplementedError

    def beside(self) -> Loaded | None:
        """Read the next batch while a step may run. Returns None if it draws, and has to be read apart."""
        raise NotImplementedError

    def apart(self) -> Loaded:
        """Read the next batch with seeded draws while no step runs."""
        with drawing_from():
            return self.read(seeded=True)

    def read(self, *, seeded: bool) -> Loaded:
        """Read the next batch; with `seeded`, seed all draws. Without a next one the share is None."""
        raise NotImplementedError

    def close(self) -> None:
        """Do nothing: only loading processes have to be ended."""

    def _load(self, samples: int, fetch: Callable[[Sequence[int]], list[Any]], *, seeded: bool) -> Share:
        """Fetch and collate this replica's part of a batch of `samples` samples."""
        plan = self.plan
        used = samples if plan.limit is None else min(samples, plan.limit)
        rows = cut_batch(used, plan.parts, plan.microbatches, uniform=plan.uniform)
        cells = [row[plan.replica] for row in rows]
        if not self._whole:
            loaded = [self._collated(fetch(cell or range(1)), seeded=seeded) for cell in cells]
        if self._whole:  # found out just now, or before
            whole = _divisible(self._collated(fetch(range(samples)), seeded=seeded), samples)
            loaded = [take(whole, cell or range(1)) for cell in cells]
        return Share(tuple(Microbatch(d, len(c), c.start) for d, c in zip(loaded, cells, strict=True)), used)

    def _collated(self, samples: list[Any], *, seeded: bool) -> Any:
        if not seeded:
            return self._collate(samples)
        seed_draws(self.plan.seed, self.epoch, self.number, COLLATE)
        before = draw_state()
        batch = self._collate(samples)
        if draw_state() != before:
            self._whole = self.draws = True
        return batch

    def _seed(self, position: int) -> None:
        seed_draws(self.plan.seed, self.epoch, self.number, position)

    def _compares(self) -> bool:
        """Return whether this batch is compared: number 0, 1, 2, 4, 8, ... of those that are read."""
        count = self.number - self.start
        return self.plan.agree is not None and count & (count - 1) == 0

    def _cells(self, share: Share) -> list[tuple[str, Facts]]:
        """Describe the collated microbatches of a share."""
        return [
            (f"microbatch {row} of batch {self.number} in epoch {self.epoch}", facts_of(each.data))
            for row, each in enumerate(share.microbatches)
        ]


class IndexReader(Reader):
    """Reader of a map-style dataset, given the indices of each batch of the epoch."""

    def __init__(self, plan: ReadingPlan, epoch: int, start: int, order: Sequence[Sequence[int]]) -> None:
        super().__init__(plan, epoch, start)
        self.order = order

    def first(self) -> Loaded:
        """Read the first batch, see `Reader.first`."""
        before = draw_state()
        loaded = self.beside()
        if loaded is not None:
            return loaded
        restore_draws(before)
        return self.apart()

    def beside(self) -> Loaded | None:
        """Read the next batch without seeding draws, see `Reader.beside`."""
        before, number = draw_state(), self.number
        loaded = self.read(seeded=False)
        if draw_state() == before:
            return loaded
        self.number, self.draws = number, True
        return None

    def read(self, *, seeded: bool) -> Loaded:
        """Read the next batch, see `Reader.read`."""
        if self.number >= len(self.order):
            return Loaded(None)
        indices = self.order[self.number]
        facts: dict[int, Facts] | None = {} if self._compares() else None

        def fetch(positions: Sequence[int]) -> list[Any]:
            samples = self._fetch(indices, positions, seeded=seeded)
            if facts is not None:
                facts.update((p, facts_of(sample)) for p, sample in zip(positions, samples, strict=True))
            return samples

        share = self._load(len(indices), fetch, seeded=seeded)
        seen = None
        if facts is not None:
            peers = [(f"sample {indices[p]}", facts[p]) for p in sorted(facts)] + self._cells(share)
            seen = Seen(len(indices), (), self.plan.replica, peers, stream=False)
        self.number += 1
        return Loaded(share, seen)

    def _fetch(self, indices: Sequence[int], positions: Sequence[int], *, seeded: bool) -> list[Any]:
        dataset, wanted = self.plan.dataset, [indices[p] for p in positions]
        fetch_many = getattr(dataset, "__getitems__", None)
        if not seeded:
            return list(fetch_many(wanted)) if fetch_many else [dataset[i] for i in wanted]
        samples = []
        for position, index in zip(positions, wanted, strict=True):
            self._seed(position)
            samples.append(fetch_many([index])[0] if fetch_many else dataset[index])
        return samples


class StreamReader(Reader):
    """Reader of an iterable dataset, which has its own order. Every replica reads all samples and uses its part."""

    streams = True

    def __init__(self, plan: ReadingPlan, epoch: int, start: int) -> None:
        super().__init__(plan, epoch, start)
        self._stream: Iterator[Any] | None = None

    def first(self) -> Loaded:
        """Read up to the first batch and that batch, see `Reader.first`."""
        return self.apart()

    def beside(self) -> Loaded:
        """Read the next batch while a step may run; a stream that begins to draw only now is noticed for later."""
        before = draw_state()
        loaded = self.read(seeded=False)
        self.draws = self.draws or draw_state() != before
        return loaded

    def read(self, *, seeded: bool) -> Loaded:
        """Read the next batch, see `Reader.read`."""
        if self._stream is None:
            self._begin()
        plan = self.plan
        samples = self._next(seeded=seeded)
        if not samples or (plan.loading.drop_last and len(samples) < plan.batch_size):
            return Loaded(None, Seen(0))
        share = self._load(len(samples), lambda positions: [samples[p] for p in positions], seeded=seeded)
        everybody: Named = ()
        peers: Named = ()
        if self._compares():
            first = self.number * plan.batch_size
            everybody = [(f"sample {first + p} of the stream", facts_of(each)) for p, each in enumerate(samples)]
            peers = self._cells(share)
        self.number += 1
        return Loaded(share, Seen(len(samples), everybody, plan.replica, peers))

    def _begin(self) -> None:
        """Begin the stream, and leave out the batches before the first one that is wanted."""
        dataset = self.plan.dataset
        if callable(tell := getattr(dataset, "set_epoch", None)):
            tell(self.epoch)
        self.number = 0
        self._seed(COLLATE)
        self._stream = iter(dataset)
        for number in range(self.start):
            self.number = number  # it keys what is drawn
            self._next(seeded=True)
        self.number = self.start

    def _next(self, *, seeded: bool) -> list[Any]:
        assert self._stream is not None
        samples: list[Any] = []
        for position in range(self.plan.batch_size):
            if seeded:
                self._seed(position)
            before = draw_state() if seeded and not self.draws and position < TRIED else None
            sample = next(self._stream, _END)
            if before is not None:
                self.draws = draw_state() != before
            if sample is _END:
                break
            samples.append(sample)
        return samples


_END = object()
"""Stands for the end of a stream, in place of a sample."""


def _divisible(batch: Any, samples: int) -> Any:
    """Check that a collated batch can be cut into samples, and return it.

    Raises:
        DataError: a value in it does not have the samples along its first dimension.
    """
    for leaf in tree_leaves(batch):
        shape = tuple(leaf.shape) if isinstance(leaf, torch.Tensor) else None
        if shape is None or (shape and shape[0] != samples):
            found = type(leaf).__name__ if shape is None else f"a tensor of shape {shape}"
            raise DataError(
                f"collate draws random numbers, so it is given all {samples} samples of a batch, but it returned "
                f"{found}, which cannot be cut into samples: draw in the dataset, or return tensors with the samples "
                "along the first dimension"
            )
    return batch
