"""Stages of software that cuts a pipeline between blocks, not by their cost."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
from round_numbers import RUNTIME, computation, costs

from shardwise.errors import StrategyError
from shardwise.predict.profile.profile import Profile
from shardwise.predict.runtime.profile import transformer_profile
from shardwise.predict.runtime.sizes import Sizes
from shardwise.predict.workers.cuts import block_starts

pytestmark = pytest.mark.usefixtures("round_numbers")

SIZES = Sizes(layers=24, hidden=1024, heads=16, kv_heads=16, ffn=4096, vocab=50304, sequence=64, gated=False, tied=True)


def profile(layers: int, stages: str = "number", *, learned_positions: bool = False) -> Profile:
    sizes = replace(SIZES, layers=layers, learned_positions=learned_positions)
    return transformer_profile(sizes, computation(RUNTIME, stages=stages), 1)


def counts(layers: int, stages: int, cut: str = "number") -> list[int]:
    """Return the blocks of each stage: segment 0 is the embedding, the last one the output."""
    starts = block_starts(profile(layers, cut), stages)
    ends = [start - 1 for start in (*starts[1:], layers + 1)]
    return [end - start for start, end in pairwise([0, *ends])]


@pytest.mark.parametrize(
    ("layers", "found"),
    [
        (24, [6, 6, 6, 6]),
        (22, [5, 6, 6, 5]),  # the ends count as blocks
        (25, [7, 6, 6, 6]),
        (2, [0, 1, 1, 0]),  # embedding and output are stages of their own
    ],
)
def test_stages_of_equal_numbers(layers: int, found: list[int]) -> None:
    assert counts(layers, 4) == found


def test_stages_by_matrices() -> None:
    # an output of 4.09 blocks: 28.09 blocks in two halves of 14.05, and the block that reaches it
    assert counts(24, 2, "matrices") == [15, 9]
    assert counts(24, 4, "matrices") == [8, 7, 7, 2]


def test_positions_lie_before_the_blocks() -> None:
    assert block_starts(profile(24, learned_positions=True), 4) == block_starts(profile(24), 4)


def test_too_few_blocks() -> None:
    with pytest.raises(StrategyError, match="2 blocks are too few for 5 stages of by hand"):
        block_starts(profile(2), 5)


@pytest.mark.parametrize(("spelled", "found"), [("pp=2", [0, 13]), ("pp=2,schedule=interleaved", [0, 7, 13, 19])])
def test_a_strategy_is_cut_there(spelled: str, found: list[int]) -> None:
    stages = costs(f"{spelled},microbatches=4", SIZES).parts.stages
    assert [stages[number].first for number in sorted(stages)] == found
