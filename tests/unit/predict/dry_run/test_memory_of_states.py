"""Optimizer states in 8 bits need a quarter of the memory, and float32 ones of a single parameter during the update."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from unittest import mock

import pytest
import torch

from shardwise.errors import StrategyError
from shardwise.parallel.optim.block_codes import BLOCK
from shardwise.parallel.optim.eight_bit import EightBitStates
from shardwise.predict.dry_run.dry_run import dry_run
from shardwise.predict.prediction import Memory
from shardwise.predict.profile.optimizer import update_of
from shardwise.strategy import Strategy
from shardwise.workload.recipes.gpt import gpt


def memory(strategy: str) -> Memory:
    work = gpt(2, 512, 8, vocabulary=256, sequence=32, batch_size=4)
    return dry_run(work, Strategy.parse(strategy), device="gpu").memory


remembered = cache(memory)


@pytest.mark.parametrize("strategy", ["single", "dp=2", "fsdp=2", "fsdp=2,zero=1", "tp=2", "pp=2"])
def test_states_need_a_quarter(strategy: str) -> None:
    before, after = remembered(strategy), remembered(f"{strategy},states=8")
    assert after.optimizer / before.optimizer == pytest.approx((1 + 4 / BLOCK) / 4, rel=0.01)
    assert before.total - after.total > 0.95 * (before.optimizer - after.optimizer)


def test_states_that_stay_wide_are_noticed() -> None:
    expected = remembered("single,states=8")
    with mock.patch.object(EightBitStates, "_narrow"):
        assert memory("single,states=8").optimizer > 3.9 * expected.optimizer


def test_an_optimizer_without_states_is_not_predicted() -> None:
    work = replace(gpt(1, 64, 4), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    with pytest.raises(StrategyError, match="states=8 needs an optimizer of torch's own"):
        update_of(work).of(Strategy(states=8))
