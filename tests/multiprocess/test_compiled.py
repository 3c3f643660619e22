"""Compiled training is that of one process whose module runs as it is, in float64."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import pytest
from breaking import assert_noticed
from equality import Factory, check
from models import ALL
from pool import Pools
from torch import Tensor

from shardwise.parallel.compiling.regions import CompiledRegion
from shardwise.parallel.program import Program
from shardwise.strategy import Strategy

CASES = (
    ("attention-dropout", "fsdp=2,compile=1,recompute=full"),
    ("separate", "fsdp=2,compile=1,recompute=selective"),
    ("tied", "tp=2,sp=1,compile=1"),
    ("rotary", "pp=2,schedule=zero-bubble,compile=1,recompute=1/2"),
    ("resnet", "dp=2,compile=1"),
    ("encoder", "dp=2,tp=2,compile=1"),
)


@pytest.mark.parametrize(("name", "strategy"), CASES)
def test_compiled_training_is_that_of_one_process(workers: Pools, name: str, strategy: str) -> None:
    check(workers, ALL[name], strategy, 2)


def count_compiled(factory: Factory, strategy: str) -> int:
    """Take a step, and return how many calls of regions ran compiled functions."""
    calls = 0
    original = CompiledRegion.__call__

    def counting(region: CompiledRegion, *arguments: Any) -> tuple[Any, ...]:
        nonlocal calls
        found = original(region, *arguments)
        calls += region.is_compiled
        return found

    program = Program.build(factory(), Strategy.parse(strategy))
    with mock.patch.object(CompiledRegion, "__call__", counting):
        program.step_share(next(program.loader().shares(0)))
    return calls


def test_regions_are_compiled(workers: Pools) -> None:
    assert min(workers(2, count_compiled, ALL["swiglu"], "dp=2,compile=1")) > 1
    assert max(workers(2, count_compiled, ALL["swiglu"], "tp=2")) == 0


def a_little_wrong() -> AbstractContextManager[Any]:
    """Compiled functions that return one percent too much."""

    def wrong(function: Callable[..., Any]) -> Callable[..., Any]:
        def more(*arguments: Any) -> tuple[Tensor, ...]:
            return tuple(value * 1.01 if value.is_floating_point() else value for value in function(*arguments))

        return more

    return mock.patch("shardwise.parallel.compiling.regions.compile_function", wrong)


def test_a_wrong_compiler_is_noticed(workers: Pools) -> None:
    assert_noticed(workers, ALL["bias"], "dp=2,compile=1", a_little_wrong)
