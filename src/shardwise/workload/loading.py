"""Choice, order and loading of the samples of an epoch. Importing this module does not import torch."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from shardwise.errors import WorkloadError

Indices = Iterable[int]
Batches = Iterable[Sequence[int]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Loading:
    """Choice, order and loading of the samples of an epoch; every field is about the global batch of all workers.

    Attributes:
        shuffle: whether each epoch of a map-style dataset has a new order, drawn from the seed and the epoch.
        drop_last: whether a last batch with fewer samples than the others is left out.
        sampler: indices of an epoch in their order, or a function of the epoch (0, 1, ...) that returns them: weighted
            draws, a curriculum. It takes the place of `shuffle`. Torch's random generators are seeded before it is
            read, so that every worker draws the same.
        batch_sampler: lists of indices, one per global batch, or a function of the epoch that returns them: batches by
            length, of possibly different sizes. `batch_size` of the workload is then their usual size.
        processes: processes of each worker that load batches beside the training; 0 uses a thread. The order and the
            draws of augmentation are the same for any number.
    """

    shuffle: bool = True
    drop_last: bool = False
    sampler: Indices | Callable[[int], Indices] | None = field(default=None, hash=False)
    batch_sampler: Batches | Callable[[int], Batches] | None = field(default=None, hash=False)
    processes: int = 0

    def __post_init__(self) -> None:
        if type(self.processes) is not int or self.processes < 0:
            raise WorkloadError(f"processes={self.processes!r} of Loading: must be a whole number, 0 or more")
        if self.sampler is not None and self.batch_sampler is not None:
            raise WorkloadError("sampler and batch_sampler of Loading exclude each other: leave one of them out")
        if self.batch_sampler is not None and self.drop_last:
            raise WorkloadError("drop_last of Loading has no meaning beside a batch_sampler, which makes the batches")
        for name in ("sampler", "batch_sampler"):
            _check_chooser(name, getattr(self, name))

    @property
    def chooser(self) -> Any:
        """Return the sampler or the batch sampler. Returns None if there is neither."""
        return self.sampler if self.batch_sampler is None else self.batch_sampler


def _check_chooser(name: str, chooser: Any) -> None:
    """Raise WorkloadError if a sampler cannot be read in every epoch, or is one worker's part of the data."""
    if chooser is None:
        return
    if not callable(chooser) and not hasattr(chooser, "__iter__"):
        raise WorkloadError(
            f"{name} of Loading must give indices, or be a function of the epoch that returns them, not {chooser!r}"
        )
    if hasattr(chooser, "__next__"):
        raise WorkloadError(
            f"{name} of Loading is a {type(chooser).__name__}, which can be read once: give a list, or a function of "
            "the epoch that returns one"
        )
    inner = getattr(chooser, "sampler", chooser)  # torch's BatchSampler wraps a sampler
    if isinstance(parts := getattr(inner, "num_replicas", None), int) and parts > 1:
        raise WorkloadError(
            f"{name} of Loading is a {type(inner).__name__} for {parts} workers: give one for the whole dataset, each "
            "batch is split over the workers anyway"
        )
