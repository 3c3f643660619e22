"""Groups of ranks in three numbers."""

from __future__ import annotations

from itertools import product

from shardwise.collective import Group


def test_domains_are_those_that_have_a_rank() -> None:
    for size, stride, first, span in product(range(1, 7), range(1, 8), range(5), range(1, 9)):
        group = Group(size, stride, first)
        assert group.domains(span) == len({rank // span for rank in group.ranks}), (group, span)
