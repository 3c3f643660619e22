"""Sampler whose rest of an epoch is shared again among the ranks after their number has changed."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sized
from typing import Any

from torch.utils.data import Sampler

from shardwise.compat.horovod.execution import share_of
from shardwise.compat.horovod.world import rank, size


class ElasticSampler(Sampler[int]):
    """Indices of this rank's part of a dataset, without those that were processed in this epoch.

    Call `record_batch` after each batch, `set_epoch` at the end of each epoch, and give the sampler to `TorchState`.

    Attributes:
        epoch: number of the epoch.
        processed_num: number of samples that all ranks have processed in this epoch.
    """

    def __init__(self, dataset: Sized, shuffle: bool = True, seed: int = 0) -> None:
        self.dataset, self.shuffle, self.seed = dataset, shuffle, seed
        self.epoch = self.processed_num = 0
        self.reset()

    def set_epoch(self, epoch: int) -> None:
        """Begin an epoch: none of its samples has been processed."""
        self.epoch, self.processed_num = epoch, 0
        self.reset()

    def record_batch(self, batch_idx: int, batch_size: int) -> None:
        """Count a batch of `batch_size` samples, which each rank has processed."""
        self.processed_num += batch_size * self.num_replicas

    def reset(self) -> None:
        """Share the samples that are left among the present ranks."""
        self.rank, self.num_replicas = rank(), size()
        order = list(range(len(self.dataset)))
        if self.shuffle:
            random.Random(self.seed + self.epoch).shuffle(order)
        self.remaining_indices = order[self.processed_num :]
        self.num_samples = share_of(len(self.remaining_indices), self.num_replicas, 0)[1]

    def state_dict(self) -> dict[str, Any]:
        """Return the epoch and the number of processed samples."""
        return {"epoch": self.epoch, "processed_num": self.processed_num}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a state."""
        self.epoch, self.processed_num = state_dict["epoch"], state_dict["processed_num"]
        self.reset()

    def __iter__(self) -> Iterator[int]:
        left = self.remaining_indices
        missing = self.num_samples * self.num_replicas - len(left)
        filled = left + [left[number % len(left)] for number in range(missing)]  # all ranks have as many
        return iter(filled[self.rank :: self.num_replicas])

    def __len__(self) -> int:
        return self.num_samples
