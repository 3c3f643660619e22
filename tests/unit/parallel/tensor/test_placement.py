from __future__ import annotations

import pytest

from shardwise.parallel.tensor.placement import Origin, Sharded, between, cut_spans, regroup, reshaped


@pytest.mark.parametrize(
    ("shape", "new", "groups"),
    [
        ((4, 8, 48), (32, 3, 16), [([0, 1], [0]), ([2], [1, 2])]),
        ((4, 1, 8), (4, 8), [([0], [0]), ([1], []), ([2], [1])]),
        ((6,), (2, 3), [([0], [0, 1])]),
        ((2, 3), (2, 3), [([0], [0]), ([1], [1])]),
    ],
)
def test_regroup(shape: tuple[int, ...], new: tuple[int, ...], groups: list[tuple[list[int], list[int]]]) -> None:
    assert regroup(shape, new) == groups


def test_heads_are_followed_through_a_view() -> None:
    features = Sharded(2, (32,), Origin("query.weight", 0))
    heads, wanted = reshaped(features, (2, 8, 32), (2, 8, 4, 8), 2)
    assert heads == Sharded(2, (4,), Origin("query.weight", 0, 8))
    assert wanted is None
    back, _ = reshaped(heads, (2, 8, 4, 8), (2, 8, 32), 2)
    assert back == features


def test_a_fused_weight_learns_its_spans() -> None:
    fused = Sharded(2, (96,), Origin("qkv.weight", 0))
    lost, wanted = reshaped(fused, (2, 8, 96), (2, 8, 3, 4, 8), 2)
    assert lost is None
    assert wanted == (32, 32, 32)
    heads, _ = reshaped(Sharded(2, wanted), (2, 8, 96), (2, 8, 3, 4, 8), 2)
    assert heads == Sharded(3, (4,))


def test_samples_and_heads_in_one_dimension() -> None:
    merged, _ = reshaped(Sharded(1, (4,)), (3, 4, 8), (12, 8), 2)
    assert merged == Sharded(0, (4, 4, 4))
    apart, _ = reshaped(merged, (12, 8), (3, 4, 8), 2)
    assert apart == Sharded(1, (4,))


def test_what_does_not_divide_is_lost() -> None:
    assert reshaped(Sharded(1, (12,)), (2, 12), (2, 3, 4), 2)[0] is None


def test_spans() -> None:
    assert cut_spans((12,), (4, 8)) == (4, 4, 4)
    assert cut_spans((4, 8), (6,)) == (4, 2, 6)
    assert between((4, 4, 4), 4, 12) == (4, 4)
    assert between((4, 4, 4), 4, 10) is None
    assert Sharded(0, (4, 8)).fits(4)
    assert not Sharded(0, (4, 6)).fits(4)
