"""One collective as it was issued: what is predicted, and what is observed in a run, in the same words.

`bytes` counts what the API call is about, on one rank, as the field counts message sizes:

    all_reduce, broadcast, reduce    the tensor
    all_gather                       the output: all parts together
    reduce_scatter                   the input: all parts together
    all_to_all                       the input
    send, recv                       the message
    barrier                          0
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import gcd

OPERATIONS = (
    "all_reduce",
    "all_gather",
    "reduce_scatter",
    "all_to_all",
    "broadcast",
    "reduce",
    "send",
    "recv",
    "barrier",
)


@dataclass(frozen=True, slots=True)
class Group:
    """Ranks `first, first + stride, ...`: what every group of a mesh looks like, in three numbers."""

    size: int
    stride: int = 1
    first: int = 0

    @staticmethod
    def of(ranks: Sequence[int]) -> Group:
        """These, ascending; as many, evenly spaced and no farther apart, where they are not evenly spaced.

        Groups of a mesh are; stages of a pipeline that share a parameter (an encoder, a decoder and an output) need not
        be.
        """
        first, last = ranks[0], ranks[-1]
        if len(ranks) == 1:
            return Group(1, 1, first)
        apart = gcd(*(after - before for before, after in pairwise(ranks)))
        return Group(len(ranks), (last - first) // apart // (len(ranks) - 1) * apart, first)

    @property
    def ranks(self) -> range:
        """The ranks, ascending."""
        return range(self.first, self.first + self.size * self.stride, self.stride)

    def within(self, span: int) -> int:
        """How many of them one domain of `span` neighbouring ranks holds, at least one."""
        return max(1, min(self.size, span // self.stride))


@dataclass(frozen=True, slots=True)
class Collective:
    """One call that moves data between ranks.

    Attributes:
        operation: one of OPERATIONS.
        bytes: see the module's docstring.
        group: who takes part; for send and recv the two ends.
        axis: of the strategy that needs it: `dp`, `fsdp`, `tp`, `pp`, `world`.
        when: `forward`, `backward`, `recompute`, `optimizer`, or `report` (losses, norms).
        asynchronous: whether computation may go on meanwhile.
    """

    operation: str
    bytes: int
    group: Group
    axis: str = ""
    when: str = ""
    asynchronous: bool = False
