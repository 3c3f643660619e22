"""Interface between the reducer that feeds errors back and the methods that compress."""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from typing import Any, Protocol

import torch.distributed as dist
from torch import Tensor

from shardwise.parallel.data.reducer import Flat

Steps = Generator[tuple[Any, bool], None, Tensor]
"""Steps of a reduction: they yield (handle of a message, whether it is the last one), and go on once it is there.

They return the sum.
"""


@dataclass(frozen=True, slots=True)
class Peers:
    """Workers whose gradients join.

    Attributes:
        group: their process group.
        ranks: number of workers.
        rank: this worker's rank in the group.
    """

    group: dist.ProcessGroup
    ranks: int
    rank: int


class Method(Protocol):
    """A way to compress a flat gradient to which the error was added; the methods leave the new error in it.

    The sum of what remains on all workers and of what they return as the sum is that of the flat gradients.
    """

    def whole(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum whole gradients."""
        ...

    def scattered(self, flat: Tensor, what: Flat, peers: Peers) -> Steps:
        """Sum scattered gradients, and return this worker's part of the sum."""
        ...

    def forget(self) -> None:
        """Forget what was kept of earlier steps."""
        ...

    def tensors(self) -> list[Tensor]:
        """Return what is kept of earlier steps."""
        ...
