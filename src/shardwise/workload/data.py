"""Distribution of samples: how a global batch is cut into shares and microbatches; `reading.loader` reads them.

Step n has the same samples under every strategy. A smaller last batch is cut as evenly as possible. A global
batch is first cut into microbatches (rows), and each row into replicas (cells), equally or in given parts:

    batch of 8, 2 microbatches, 2 replicas        row 0: [0 1 | 2 3]    row 1: [4 5 | 6 7]
    the same, parts of 3 and 1                    row 0: [0 1 2 | 3]    row 1: [4 5 6 | 7]
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import Dataset, IterableDataset

from shardwise.errors import DataError
from shardwise.workload.reading.draws import drawing_from


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


def is_map_style(dataset: Any) -> bool:
    """Return whether samples are read by index; torch's own base classes have a `__getitem__` that only raises."""
    own = getattr(type(dataset), "__getitem__", None)
    return own is not None and own is not Dataset.__getitem__ and not isinstance(dataset, IterableDataset)


def first_samples(dataset: Any, count: int) -> list[Any] | None:
    """Return the first samples in the dataset's own order, to look at; all workers draw the same in them.

    Returns None if reading them would use up an iterable that can be read only once.
    """
    with drawing_from(0):
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
