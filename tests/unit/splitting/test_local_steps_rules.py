"""Which parameters are averaged together, and when."""

from __future__ import annotations

import pytest

from shardwise.splitting.local_steps import averaged_after, cut_fragments


@pytest.mark.parametrize(
    ("sizes", "count", "ends"),
    [
        ([5], 1, [1]),
        ([1] * 6, 3, [2, 4, 6]),
        ([10, 1, 1, 10], 2, [2, 4]),
        ([100, 1, 1], 3, [1, 2, 3]),
        ([], 2, [0, 0]),
        ([1], 2, [0, 1]),
    ],
)
def test_fragments_are_consecutive_and_about_equal(sizes: list[int], count: int, ends: list[int]) -> None:
    found = cut_fragments(sizes, count)
    assert [each.stop for each in found] == ends
    assert [each.start for each in found] == [0, *ends[:-1]]


@pytest.mark.parametrize(("local", "fragments"), [(1, 1), (4, 1), (4, 2), (6, 3), (3, 3)])
def test_each_fragment_has_its_turn_once_in_as_many_steps(local: int, fragments: int) -> None:
    turns = [averaged_after(steps, local, fragments) for steps in range(1, 3 * local + 1)]
    for first in range(2 * local):
        found = [number for number in turns[first : first + local] if number is not None]
        assert sorted(found) == list(range(fragments))
    assert turns[local - 1] == fragments - 1
