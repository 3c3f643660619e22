"""Records of collectives in one form, so that predicted ones and those observed in a run can be compared.

`bytes` is the message size of the call on one rank, by the usual convention:

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
    """Process group in three numbers: `size` ranks `first, first + stride, ...`, the form of all groups of a mesh."""

    size: int
    stride: int = 1
    first: int = 0

    @staticmethod
    def of(ranks: Sequence[int]) -> Group:
        """Build the group of ascending `ranks`; unevenly spaced ranks are approximated by evenly spaced ones.

        The approximation has the same size and first rank, and its last rank does not exceed theirs. Groups of a mesh
        are evenly spaced. Pipeline stages that share a parameter (an encoder, a decoder and an output) need not be.
        """
        first, last = ranks[0], ranks[-1]
        if len(ranks) == 1:
            return Group(1, 1, first)
        apart = gcd(*(after - before for before, after in pairwise(ranks)))
        return Group(len(ranks), (last - first) // apart // (len(ranks) - 1) * apart, first)

    @property
    def ranks(self) -> range:
        """Return the ranks in ascending order."""
        return range(self.first, self.first + self.size * self.stride, self.stride)

    def within(self, span: int) -> int:
        """Return the number of this group's ranks in one domain of `span` neighbouring ranks, at least 1."""
        return max(1, min(self.size, span // self.stride))

    def domains(self, span: int) -> int:
        """Return the number of domains that its ranks lie in; each is of `span` neighbouring ranks, the first from 0.

        Ranks that are nearer to each other than `span` leave out no domain between their first and their last.
        """
        if self.stride >= span:
            return self.size
        return self.ranks[-1] // span - self.first // span + 1


@dataclass(frozen=True, slots=True)
class Collective:
    """Record of one call that moves data between ranks.

    Attributes:
        operation: one of OPERATIONS.
        bytes: message size; see the module's docstring.
        group: the ranks that take part; for send and recv the two ends.
        axis: axis of the strategy that needs it: `dp`, `fsdp`, `tp`, `pp`, `world`.
        when: phase of the step: `forward`, `backward`, `recompute`, `optimizer`, `report`
            (losses, norms), `weight` (of the batch, summed over replicas), or `average` (of parameters after local
            steps).
        asynchronous: True if computation may overlap it.
        tag: number that pairs a send with its recv; 0 for other operations.
    """

    operation: str
    bytes: int
    group: Group
    axis: str = ""
    when: str = ""
    asynchronous: bool = False
    tag: int = 0
